"""The reference: Hugging Face's own DeepseekV3ForCausalLM on the dequantized weights, in float32."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.convert import dequantized_state_dict
from .checkpoint.layout import model_layout
from .memory import check_memory
from .model_config import ModelConfig, read_config_json


def hugging_face_model(model_dir: str | Path) -> DeepseekV3ForCausalLM:
    """Loads a checkpoint folder, FP8 or not, into transformers' class in float32 with eager attention.

    Raises ConfigError when the machine's memory cannot hold it.
    """
    with Checkpoint(model_dir) as checkpoint:
        _check_memory(checkpoint.config)
        state_dict = dequantized_state_dict(checkpoint)
    model = DeepseekV3ForCausalLM.from_pretrained(
        None, config=hugging_face_config(model_dir), state_dict=state_dict, dtype=torch.float32
    )
    return model.eval()


def hugging_face_config(model_dir: str | Path) -> DeepseekV3Config:
    """transformers' config of a checkpoint folder, for unquantized weights and eager attention."""
    fields = read_config_json(model_dir)
    for name in ("quantization_config", "auto_map", "torch_dtype", "dtype", "model_type"):
        fields.pop(name, None)
    return DeepseekV3Config(**fields, attn_implementation="eager")


def _check_memory(config: ModelConfig) -> None:
    needed = sum(spec.numel for spec in model_layout(config)) * torch.float32.itemsize
    remedy = "compare with saved outputs instead (inference_demo: --expected-outputs-path)"
    check_memory(needed, "Hugging Face's model in float32", remedy)


@torch.no_grad()
def reference_logits(model: DeepseekV3ForCausalLM, token_ids: list[int]) -> Tensor:
    """Logits float32 [S, vocab] after each token of one sequence, unpadded and uncached."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0].to(torch.float32)
