"""Text generation through transformers' GenerationMixin: greedy, sampling, stop tokens, batches, streaming."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checked_generation import CheckedGenerationMixin
from ..token_choice import TokenChoice
from .draft_and_verify import DraftAndVerify


class HuggingFaceGenerationAdapter(CheckedGenerationMixin, PreTrainedModel):
    """Gives a model `generate()`; prompts of a batch are padded on the right.

    The KV cache lives in the model. GenerationMixin appends new tokens behind the padding; their positions still
    follow the last real token of each row.
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

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        lengths = attention_mask.sum(-1, keepdim=True)
        if not self.neuron_model.kv_cache_populated:
            position_ids = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        # The newest token's own position; the model derives which cached positions it sees.
        return {"input_ids": input_ids[:, -1:], "position_ids": lengths - 1}

    def _speculator(self, choice: TokenChoice) -> DraftAndVerify:
        return DraftAndVerify(self.neuron_model, choice)

    def forward(self, input_ids: Tensor, return_dict: bool = True, **kwargs: Any) -> CausalLMOutputWithPast:
        return self.neuron_model(input_ids=input_ids, **kwargs)
