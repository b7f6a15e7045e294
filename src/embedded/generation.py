"""Text generation through transformers' GenerationMixin: greedy, sampling, stop tokens, batches, streaming."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ConfigError


class HuggingFaceGenerationAdapter(PreTrainedModel, GenerationMixin):
    """Gives a model `generate()`; prompts of a batch are padded on the right.

    The KV cache lives in the model, so GenerationMixin is told that there is none (`use_cache=False`). It appends new
    tokens behind the padding; their positions still follow the last real token of each row.
    """

    main_input_name = "input_ids"
    _is_stateful = True
    _supports_cache_class = False

    def __init__(self, model: Any, generation_config: GenerationConfig | None = None):
        fields = {name: getattr(model.config, name, None) for name in ("vocab_size", "bos_token_id", "eos_token_id")}
        super().__init__(PretrainedConfig(pad_token_id=model.config.pad_token_id, **fields))
        self.neuron_model = model
        self.generation_config = generation_config or GenerationConfig.from_model_config(self.config)

    @property
    def device(self) -> torch.device:
        return self.neuron_model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.neuron_model.neuron_config.torch_dtype

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As GenerationMixin.generate; raises ConfigError for an empty prompt or one padded on the left."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.shape[1] == 0 or (attention_mask.sum(-1) == 0).any():
            raise ConfigError("empty prompt; give at least one token")
        if (attention_mask.diff(dim=-1) > 0).any():
            raise ConfigError("prompts are padded on the left; pad them on the right (tokenizer.padding_side='right')")
        self.neuron_model.reset()
        with _no_advice_to_pad_left():
            return super().generate(input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        lengths = attention_mask.sum(-1, keepdim=True)
        if not self.neuron_model.kv_cache_populated:
            position_ids = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        # The newest token's own position; the model derives which cached positions it sees.
        return {"input_ids": input_ids[:, -1:], "position_ids": lengths - 1}

    def forward(self, input_ids: Tensor, return_dict: bool = True, **kwargs: Any) -> CausalLMOutputWithPast:
        return self.neuron_model(input_ids=input_ids, **kwargs)


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
