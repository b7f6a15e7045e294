"""What both backends' adapters check in generate(): an argument works as in transformers, or is refused."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from .errors import ConfigError
from .requests import check_right_padded, check_token_ids
from .speculation import MTP
from .speculative_generation import check_room, speculate
from .third_party import told
from .token_choice import TokenChoice

# Arguments of generate() that only None leaves right, and what to do instead.
_REFUSED_ARGUMENTS = {
    "inputs_embeds": "give input_ids",
    "past_key_values": "the KV cache lives in the model; give the whole prompt",
    "position_ids": "they follow from the attention mask",
    "assistant_model": "assisted generation is not implemented",
    "negative_prompt_ids": "classifier-free guidance is not implemented",
    "negative_prompt_attention_mask": "classifier-free guidance is not implemented",
    "custom_generate": "only transformers' own greedy search and sampling are implemented",
}
# Fields of a GenerationConfig likewise, with the values that change nothing.
_REFUSED_FIELDS = {
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance is not implemented"),
    "output_attentions": ((None, False), "attention weights are not kept"),
    "output_hidden_states": ((None, False), "hidden states are not kept"),
    "cache_implementation": ((None,), "the KV cache lives in the model"),
    "prefill_chunk_size": ((None,), "prompts run in one piece"),
    "token_healing": ((None, False), "it pads prompts on the left"),
}


class CheckedGenerationMixin(GenerationMixin):
    """Stands ahead of an adapter's other base classes. The adapter has `neuron_model`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        speculation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As GenerationMixin.generate, greedy or sampling, for prompts [B, S] padded on the right.

        Without attention_mask, padding is found by its token as in transformers. use_cache changes nothing, since
        the model always has its cache. speculation: "mtp" drafts with the checkpoint's MTP layer, of a model with
        enable_eagle_speculation; `speculation_counts` tells how well. Raises ConfigError for what cannot be answered
        right.
        """
        self._speculates = self._asked_speculation(speculation)
        for name, remedy in _REFUSED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise ConfigError(f"generate: {name} is not supported; {remedy}")
        input_ids = self._checked_prompts(inputs, kwargs.pop("input_ids", None))
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            mask = self._find_padding(input_ids, generation_config or self.generation_config, kwargs)
        check_right_padded(mask, input_ids.shape)
        check_token_ids(input_ids[mask.bool()].tolist(), self.config.vocab_size)
        self.neuron_model.reset()
        kwargs |= {"attention_mask": mask.to(torch.int64), "generation_config": generation_config, "use_cache": False}
        with told("generate", ValueError, TypeError, NotImplementedError), _no_advice_to_pad_left():
            return super().generate(input_ids, **kwargs)

    def _asked_speculation(self, speculation: str | None) -> bool:
        if speculation not in (None, MTP):
            raise ConfigError(f"generate: speculation {speculation!r} is not supported; use {MTP!r} or None")
        if speculation and not self.neuron_model.neuron_config.enable_fused_speculation:
            raise ConfigError("generate: speculation needs enable_eagle_speculation=True in the NeuronConfig")
        return speculation is not None

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if not self._speculates:
            plain = {"synced_gpus": synced_gpus, "streamer": streamer, **model_kwargs}
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **plain)
        mask, config = model_kwargs["attention_mask"], self.neuron_model.neuron_config
        speculator = self._speculator(TokenChoice(logits_processor, generation_config.do_sample, len(input_ids)))
        check_room(mask, generation_config.max_length - input_ids.shape[1], speculator.drafted, config.max_length)
        sequences, self.speculation_counts = speculate(
            speculator, input_ids, mask, stopping_criteria, generation_config, streamer
        )
        return sequences

    def _checked_prompts(self, inputs: Tensor | None, input_ids: Tensor | None) -> Tensor:
        if (inputs is None) == (input_ids is None):
            raise ConfigError("generate: give the prompts once, as input_ids")
        prompts = input_ids if inputs is None else inputs
        if not isinstance(prompts, Tensor) or prompts.ndim != 2 or prompts.is_floating_point():
            raise ConfigError("generate: input_ids must be a tensor of integers [batch, tokens]")
        return prompts

    def _find_padding(self, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> Tensor:
        """The mask that transformers infers: of padding tokens, unless they also end sequences."""
        fields = [
            kwargs[name] if name in kwargs else getattr(config, name) for name in ("pad_token_id", "eos_token_id")
        ]
        pad, eos = (self.generation_config.pad_token_id if fields[0] is None else fields[0]), fields[1]
        stops = eos if isinstance(eos, list) else [eos]
        return torch.ones_like(input_ids) if pad is None or pad in stops else (input_ids != pad).to(torch.int64)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        """The config that is in force once defaults and arguments are merged is the one to check."""
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ConfigError(f"generate: {mode.value} is not supported; use greedy search or sampling (num_beams=1)")
        if mode is GenerationMode.GREEDY_SEARCH and (config.num_return_sequences or 1) > 1:
            raise ConfigError(
                f"generate: num_return_sequences {config.num_return_sequences} of greedy search are all the same; "
                "set do_sample=True"
            )
        if config.top_p is not None and not 0 < config.top_p <= 1:
            raise ConfigError(f"generate: top_p {config.top_p} must be above 0 and at most 1")
        for name, (neutral, remedy) in _REFUSED_FIELDS.items():
            value = getattr(config, name, None)
            if value not in neutral:
                raise ConfigError(f"generate: {name}={value!r} is not supported; {remedy}")
        return config, model_kwargs


@contextmanager
def _no_advice_to_pad_left() -> Iterator[None]:
    """transformers warns that padding on the right gives wrong results, which is untrue here."""
    logger = logging.getLogger("transformers.generation.utils")

    def keep(record: logging.LogRecord) -> bool:
        return "right-padding was detected" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
