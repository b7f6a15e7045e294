"""Loads a causal LM on the graphs that NxDI would compile for it."""

import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint.sharder import shard_checkpoint
from ..dtypes import dtype_name
from ..errors import DeviceGraphError
from ..rank_files import check_rank_files
from .device_model import BucketGraph, DeviceModel, Lowering, TracedModule
from .rank_zero import lower, named_tensors, rank_zero
from .replicas import Replicas


def load_on_device_graphs(model: Any, compiled_path: str | Path | None = None) -> DeviceModel:
    """Makes `model`, a causal LM of NxDI that is not loaded yet, run its device graphs: all ranks, in this process.

    compiled_path: folder that holds the rank files in weights/, as compile() and `nxdi-deepseek shard` write them; from
    the model's checkpoint where it is None. Raises DeviceGraphError for graphs that do not fit the weights or caches,
    CheckpointError for rank files that are another model's.
    """
    if compiled_path is None:
        with tempfile.TemporaryDirectory() as folder:
            return _load(model, _shard(model, folder))
    check_rank_files(compiled_path, model.config, range(model.neuron_config.tp_degree))
    return _load(model, _read_ranks(model, Path(compiled_path)))


def _shard(model: Any, folder: str) -> list[dict[str, Tensor]]:
    neuron_config = model.neuron_config
    dtype, weights = dtype_name(neuron_config.torch_dtype), neuron_config.weights
    fused = neuron_config.enable_fused_speculation
    shard_checkpoint(model._checkpoint_dir(), folder, neuron_config.tp_degree, dtype, weights=weights, fused=fused)
    return _read_ranks(model, Path(folder))


def _read_ranks(model: Any, folder: Path) -> list[dict[str, Tensor]]:
    ranks = range(model.neuron_config.tp_degree)
    return [load_file(folder / "weights" / f"tp{rank}_sharded_checkpoint.safetensors") for rank in ranks]


def _load(model: Any, weights: list[dict[str, Tensor]]) -> DeviceModel:
    from neuronx_distributed_inference.utils.compile_env import set_compile_env_vars

    neuron_config = model.neuron_config
    set_compile_env_vars(neuron_config)  # as compile() does
    replicas = Replicas.of(neuron_config.tp_degree)
    instances = {}
    graphs, states = [], {}
    for wrapper in model.models:
        instance = wrapper.get_model_instance()
        with rank_zero(neuron_config.tp_degree, neuron_config.logical_nc_config):
            instance.load_module()
        _assign(instance.module, weights[0])
        instances[wrapper] = instance
        graphs += _bucket_graphs(wrapper, instance)
        states |= _unsharded(instance.module, weights[0])
    _share_hooks([instance.module for instance in instances.values()])
    tensors = {name: replicas.put([rank[name] for rank in weights]) for name in weights[0]}
    tensors |= {name: replicas.replicate(value) for name, value in states.items()}
    device_model = DeviceModel(replicas, graphs, tensors, neuron_config.kv_seq_shards)
    for wrapper, instance in instances.items():
        wrapper.model = TracedModule(device_model, instance.module)
        wrapper.is_neuron = lambda: True
    return device_model


def _assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives the module rank 0's weights, so that it shows what the graphs are called with."""
    for child in module.modules():
        child._parameters.pop("master_weight", None)  # a second name that tracing gives a layer's weight
    for name, parameter in module.named_parameters():
        if name in weights and weights[name].dtype != parameter.dtype:
            raise DeviceGraphError(f"{name} is {parameter.dtype} in the graphs and {weights[name].dtype} in rank files")
    missing, _ = module.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in missing if not _is_state(name)]
    if missing:
        raise DeviceGraphError(f"the rank files lack {', '.join(missing)}")


def _is_state(name: str) -> bool:
    """Whether a tensor is the module's own: a cache, or the hidden states that drafts start from."""
    return "kv_mgr." in name or name.startswith("hidden_state_rolling_buffer.")


def _share_hooks(modules: list[nn.Module]) -> None:
    """A forward hook of one phase's module sees the other phases too, as in NxDI's CPU mode, which has one module."""
    for name, child in modules[0].named_modules():
        for module in modules[1:]:
            module.get_submodule(name)._forward_hooks = child._forward_hooks


def _unsharded(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caches and buffers, which no rank file has: the same on all ranks."""
    return {name: tensor for name, tensor in named_tensors(module).items() if name not in weights}


def _bucket_graphs(wrapper: Any, instance: Any) -> list[BucketGraph]:
    return [
        BucketGraph(
            f"{wrapper.tag} {wrapper.neuron_config.buckets[bucket]}",
            inputs,
            instance.module,
            partial(_lower_bucket, wrapper, instance, bucket, inputs),
        )
        for bucket, inputs in enumerate(wrapper.input_generator())
    ]


def _lower_bucket(wrapper: Any, instance: Any, bucket: int, inputs: tuple[Tensor, ...]) -> Lowering:
    start = time.monotonic()
    neuron_config = wrapper.neuron_config
    try:
        with rank_zero(neuron_config.tp_degree, neuron_config.logical_nc_config):
            module, aliased = instance.get(bucket)
            lowered = lower(module, inputs)
    except AssertionError as error:  # NxD's way of refusing sizes
        raise DeviceGraphError(f"{wrapper.tag} {neuron_config.buckets[bucket]}: {error}") from error
    names = {id(tensor): name for name, tensor in module.named_parameters(remove_duplicate=False)}
    aliases = {names[id(tensor)]: place for tensor, place in aliased.items()}
    _check_aliases(f"{wrapper.tag} {neuron_config.buckets[bucket]}", module, lowered.outputs, aliases)
    return Lowering(lowered, aliases, time.monotonic() - start)


def _results(neuron_config: Any) -> int:
    """Outputs that are no cache. With speculation: tokens, and the next step's token, mask and position."""
    if neuron_config.enable_fused_speculation:
        return 4
    return 2 if getattr(neuron_config, "output_logits", False) else 1


def _check_aliases(graph: str, module: nn.Module, outputs: list[Tensor], aliases: Mapping[str, int]) -> None:
    """Every cache has one output that is its next value, and of all outputs only the results have no cache."""
    results = len(outputs) - len(aliases)
    expected = _results(module.neuron_config)
    if sorted(aliases.values()) != list(range(expected, len(outputs))):
        raise DeviceGraphError(
            f"{graph}: {len(outputs)} outputs, of which {results} are no cache and {expected} should be; "
            f"input_output_aliases are {aliases}"
        )
    for name, place in aliases.items():
        state, output = module.get_parameter(name), outputs[place]
        if (state.shape, state.dtype) != (output.shape, output.dtype):
            raise DeviceGraphError(
                f"{graph}: output {place} is {list(output.shape)} {output.dtype}, and {name}, which it updates, is "
                f"{list(state.shape)} {state.dtype}"
            )
