"""The judge of FP8 weights: the checkpoint again, with the values of a model's own FP8 experts in it."""

import json
from pathlib import Path

import torch
from nxdi_deepseek.checkpoint.convert import dequantized_state_dict
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM
from safetensors.torch import save_file

from support.models import load_config


def parts_of(model_dir, whole=False, **neuron):
    """The state dicts of all ranks in order, or the one of the whole model, which NxDI cuts itself."""
    model = NeuronDeepseekV3ForCausalLM(str(model_dir), load_config(model_dir, **neuron))
    if whole:
        return [model.checkpoint_loader_fn()]
    return [model.rank_state_dict(rank, model.config) for rank in range(model.neuron_config.tp_degree)]


def write_dequantized(folder, model_dir, parts):
    """A float32 checkpoint folder; Hugging Face's model loads from it."""
    folder, config = Path(folder), json.loads((Path(model_dir) / "config.json").read_text())
    config.pop("quantization_config", None)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with Checkpoint(model_dir) as checkpoint:
        tensors = dequantized_state_dict(checkpoint)
        layers = filter(checkpoint.config.has_experts, range(checkpoint.config.num_hidden_layers))
    for layer in layers:
        mlp_op = f"layers.{layer}.mlp.expert_mlps.mlp_op."
        gate, up = zip(*(values(part, mlp_op + "gate_up_proj").chunk(2, dim=2) for part in parts), strict=True)
        down = torch.cat([values(part, mlp_op + "down_proj") for part in parts], dim=1)
        projections = {"gate": torch.cat(gate, dim=2), "up": torch.cat(up, dim=2), "down": down}
        for projection, weights in projections.items():
            for expert, weight in enumerate(weights):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
                assert tensors[name].shape == weight.T.shape
                tensors[name] = weight.T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def values(part, name):
    """[E, rows, columns] in float32: each code times the scale of its block."""
    codes, scale = part[name + ".weight"], part[name + ".scale"]
    assert (codes.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    for axis, size in enumerate(codes.shape):
        scale = scale.repeat_interleave(size // scale.shape[axis], dim=axis)
    return codes.to(torch.float32) * scale
