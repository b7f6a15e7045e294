"""Routed experts in FP8, taken apart by plain torch: what rank files should hold, and what those hold."""

import torch
from nxdi_deepseek.example_configs import WIDE_CONFIG
from safetensors.torch import load_file

# A rank of 64 has 32 of the 2,048 intermediate values, as at the released sizes; blocks of the released size.
CONFIG = WIDE_CONFIG | {
    "hidden_size": 256,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
LAYER = "layers.1.mlp.expert_mlps.mlp_op."
EXPONENT_15 = 0x78


def stored_tensors(model_dir):
    tensors = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def rank_file(out_dir, rank):
    return load_file(out_dir / "weights" / f"tp{rank}_sharded_checkpoint.safetensors")


def whole_experts(weights, config, layer=1):
    """gate_up [E, H, 2I] and down [E, I, H] of decoded (or other) matrices by Hugging Face name."""
    prefix = f"model.layers.{layer}.mlp.experts."
    names = [
        [f"{prefix}{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down")]
        for expert in range(config["n_routed_experts"])
    ]
    gate_up = [torch.cat([weights[gate].T, weights[up].T], dim=1) for gate, up, _ in names]
    return torch.stack(gate_up), torch.stack([weights[down].T for _, _, down in names])


def rank_slice(gate_up, down, rank, tp_degree):
    """What a rank holds of the two; gate and up are split each on its own."""
    width = down.shape[1] // tp_degree
    own = slice(rank * width, (rank + 1) * width)
    gate, up = gate_up.chunk(2, dim=2)
    return torch.cat([gate[..., own], up[..., own]], dim=2), down[:, own]


def spread(scale, shape):
    """Each factor of scale [E, a, b] over its block of a weight [E, rows, columns]."""
    rows, columns = shape[1] // scale.shape[1], shape[2] // scale.shape[2]
    return scale.repeat_interleave(rows, 1).repeat_interleave(columns, 2)


def dequantized(tensors, projection, layer=LAYER):
    """code * scale of a rank's tensors, float32."""
    codes = tensors[f"{layer}{projection}.weight"]
    return codes.float() * spread(tensors[f"{layer}{projection}.scale"], codes.shape)


def largest_code(tensors):
    """The largest magnitude among all FP8 codes."""
    fp8 = [tensor for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fn]
    return max(int((tensor.view(torch.uint8) & 0x7F).max()) for tensor in fp8)
