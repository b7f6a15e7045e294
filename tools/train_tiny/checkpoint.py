"""Names: the training model's stacked experts <-> the released checkpoint's, and reading a released folder."""

import re

import torch
from nxdi_deepseek.checkpoint.convert import read_weight
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.fp8 import SCALE_SUFFIX

STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate|up|down)_proj")
SPLIT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def to_released_names(state, mtp_layer):
    """Split stacked experts; give the MTP layer its own copy of embedding and head, as the release does."""
    released = {}
    for name, tensor in state.items():
        match = STACKED.fullmatch(name)
        if match:
            for expert, weight in enumerate(tensor):
                released[f"{match[1]}.{expert}.{match[2]}_proj.weight"] = weight
        else:
            released[name] = tensor
    prefix = f"model.layers.{mtp_layer}"
    released[f"{prefix}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
    released[f"{prefix}.shared_head.head.weight"] = state["lm_head.weight"]
    return released


def to_training_names(released, mtp_layer):
    """The inverse: stack the experts, drop the MTP layer's copies."""
    state, experts = {}, {}
    for name, tensor in released.items():
        match = SPLIT.fullmatch(name)
        if match:
            experts.setdefault(f"{match[1]}.{match[3]}_proj", {})[int(match[2])] = tensor
        else:
            state[name] = tensor
    for copy in ("embed_tokens", "shared_head.head"):
        del state[f"model.layers.{mtp_layer}.{copy}.weight"]
    for name, parts in experts.items():
        state[name] = torch.stack([parts[expert] for expert in range(len(parts))])
    return state


def read_dequantized(folder, dtype=torch.float32):
    """Every tensor of a released folder under its own name, FP8 blocks multiplied out; biases stay float32."""
    with Checkpoint(folder) as checkpoint:
        return {
            name: read_weight(
                checkpoint.reader,
                name,
                checkpoint.config,
                torch.float32 if name.endswith("e_score_correction_bias") else dtype,
            )
            for name in checkpoint.reader.names()
            if not name.endswith(SCALE_SUFFIX)
        }
