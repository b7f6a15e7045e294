"""NxDI's generation adapter, with the checks and the results of the embedded runtime's."""

from typing import Any

import torch
from neuronx_distributed_inference.utils.hf_adapter import HuggingFaceGenerationAdapter
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import LogitsProcessorList

from .checked_generation import CheckedGenerationMixin
from .errors import ConfigError
from .token_choice import TokenChoice

# What the device does itself, from the sampling parameters.
_DONE_ON_DEVICE = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")


class FusedSteps:
    """Greedy steps of NxDI's fused model, which drafts and verifies in one graph. Sequences are in its first slots."""

    def __init__(self, model: Any):
        self._model, self.drafted = model, model.neuron_config.speculation_length - 1

    def start(self, input_ids: Tensor, attention_mask: Tensor, known: list[Tensor]) -> Tensor:
        positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        output = self._model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
        self._last, self._position = output.fused_outputs[0][:, 0].long(), attention_mask.sum(-1)
        return self._last

    def step(self, known: list[Tensor], frozen: Tensor) -> tuple[Tensor, Tensor]:
        output = self._model(input_ids=self._last[:, None], position_ids=self._position[:, None])
        tokens = output.fused_outputs[0].long()  # -1 behind those that are accepted
        accepted = (tokens >= 0).sum(-1) - 1
        last = tokens.gather(1, accepted[:, None])[:, 0]
        self._last = torch.where(frozen, self._last, last)
        self._position = torch.where(frozen, self._position, self._position + accepted + 1)
        return tokens, accepted


class NxDIGenerationAdapter(CheckedGenerationMixin, HuggingFaceGenerationAdapter):
    """Off the device it samples as transformers does. NxDI's own keeps the sampler of its first call, and applies
    temperature, top_k and top_p twice."""

    def _sample(
        self, input_ids: Any, logits_processor: LogitsProcessorList, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        if self._speculates:
            return super()._sample(input_ids, logits_processor, generation_config=generation_config, **kwargs)
        sample = GenerationMixin._sample
        if self.on_device_sampling:
            self._check_sampling_on_device(logits_processor, generation_config, kwargs.pop("streamer", None))
            sample = HuggingFaceGenerationAdapter._sample
        return sample(self, input_ids, logits_processor=logits_processor, generation_config=generation_config, **kwargs)

    def _asked_speculation(self, speculation: str | None) -> bool:
        """A model compiled for speculation has no other steps."""
        return super()._asked_speculation(speculation) or self.neuron_config.enable_fused_speculation

    def _speculator(self, choice: TokenChoice) -> FusedSteps:
        if not choice.is_greedy:
            raise ConfigError("generate: with enable_eagle_speculation, NxDI's model is greedy; use do_sample=False")
        return FusedSteps(self.neuron_model)

    def _check_sampling_on_device(
        self, processors: LogitsProcessorList, asked: GenerationConfig, streamer: Any
    ) -> None:
        """Refuses what would be ignored, and makes a greedy request greedy also where the device samples."""
        device = self.neuron_config.on_device_sampling_config
        ignored = [name for name in map(_class_name, processors) if name not in _DONE_ON_DEVICE]
        problems = {
            f"{', '.join(ignored)} would be ignored": ignored,
            "a streamer would be ignored": streamer,
            "do_sample=True needs do_sample or dynamic in it": asked.do_sample
            and not (device.do_sample or device.dynamic),
            "temperature and top_p need dynamic=True in it": asked.do_sample
            and not device.dynamic
            and (asked.temperature, asked.top_p) != (1.0, 1.0),
            "top_k must be at least 1": asked.do_sample and (asked.top_k or 0) < 1,
            "output_scores and output_logits need output_logits=True in the NeuronConfig": (
                (asked.output_scores or asked.output_logits) and not self.neuron_config.output_logits
            ),
        }
        for problem, holds in problems.items():
            if holds:
                raise ConfigError(f"generate: with on_device_sampling_config, {problem}")
        if not asked.do_sample:
            asked.top_k, asked.top_p, asked.temperature = 1, 1.0, 1.0


def _class_name(value: Any) -> str:
    return type(value).__name__
