"""Sharding by NxDI itself, in CPU mode."""

import importlib

import torch
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM
from nxdi_deepseek.without_sdk import stand_ins

from support.models import load_config


def shard_with_nxdi(model_dir, out_dir, tp_degree, dtype, monkeypatch, fields=(), **neuron):
    """As NxDI's compile() does. In CPU mode its mock of torch.distributed could not make process groups.

    fields: of the config in memory, where it differs from config.json. Returns the model.
    """
    monkeypatch.setenv("NXD_CPU_MODE", "0")
    parallel_state = importlib.import_module("neuronx_distributed.parallel_layers.parallel_state")
    monkeypatch.setattr(parallel_state, "_SPECULATIVE_DRAFT_GROUP", None)  # NxD leaves the last one
    torch_neuronx = importlib.import_module("torch_neuronx")
    if stand_ins.is_stand_in(torch_neuronx):
        monkeypatch.setattr(torch_neuronx, "__version__", "2", raising=False)
    neuron |= {"torch_dtype": getattr(torch, dtype), "save_sharded_checkpoint": True, "batch_size": 1}
    config = load_config(model_dir, tp_degree=tp_degree, **neuron)
    vars(config).update(fields)
    model = NeuronDeepseekV3ForCausalLM(str(model_dir), config)
    builder = model.get_builder()
    # Tied weights of a single rank share memory, and NxDI's save_file refuses such tensors.
    builder.checkpoint_loader = lambda: {name: tensor.clone() for name, tensor in model.checkpoint_loader_fn().items()}
    builder.shard_checkpoint(serialize_path=f"{out_dir}/weights/")
    return model
