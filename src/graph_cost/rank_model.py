"""Rank 0 of a model as NxDI's compile() would trace it, on the meta device, and the part of it that is asked for."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.utils.model_utils import init_on_device
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM
from neuronx_distributed_inference.modules.kvcache.kv_cache_manager import KVCacheManager
from neuronx_distributed_inference.utils.compile_env import set_compile_env_vars
from torch import Tensor, nn

from ..errors import GraphCostError
from .request import Request

_WRAPPERS = {
    "prefill": "context_encoding_model",
    "decode": "token_generation_model",
    "speculate": "fused_spec_model",
}
_OUR_CLASS = "NeuronDeepseekV3ForCausalLM"


class Part(nn.Module):
    """A part of the model that returns the hidden states (or logits) and the new key/values, and its inputs."""

    def __init__(self, request: Request):
        super().__init__()
        # Of a cache in blocks, the first bucket is without prefix.
        instance, self.inputs = model_instance(_application(request), request.phase, 1 if request.prefix else 0)
        model = instance.module
        models = [model.target_model, model.draft_model] if request.phase == "speculate" else [model]
        caches = [cache for each in models for cache in each.kv_mgr.past_key_values]
        if request.part != "model":
            layer = request.layer
            caches = caches[2 * layer : 2 * layer + 2]
            model = model.layers[layer].self_attn if request.part == "attention" else model.layers[layer]
            self.inputs = _layer_inputs(request, instance.config.neuron_config, caches)
        self.module = model
        row_bytes = sum(cache.nbytes * cache.shape[-1] // cache.numel() for cache in caches)
        self.kv_bytes_per_token = row_bytes // _shards(instance.config.neuron_config)

    def forward(self, *args: Any, **inputs: Any) -> list[Tensor]:
        outputs = self.module(*args, **inputs)
        if isinstance(outputs, list):  # the model's: logits and the updated caches
            return outputs
        return [outputs[0], *outputs[1]]


def model_instance(app: NeuronBaseForCausalLM, phase: str, bucket: int = 0) -> tuple[Any, dict[str, Any]]:
    """NxDI's model instance of the phase, loaded, and the example inputs of a bucket."""
    wrapper = getattr(app, _WRAPPERS[phase])
    tp_degree = wrapper.neuron_config.tp_degree
    torch.distributed.init_process_group(backend="xla", rank=0, world_size=tp_degree)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_degree,
        skip_collective_init=True,
        lnc_size=wrapper.neuron_config.logical_nc_config,
    )
    parallel_state.initialize_speculative_draft_group(tp_degree)
    parallel_state.set_aot_mode(True)
    instance = wrapper.get_model_instance()
    # Parameters reach the meta device as they are registered, but caches are filled with zeros ahead of it.
    cache_on_meta = mock.patch.object(KVCacheManager, "__init__", _on_meta(KVCacheManager.__init__))
    with init_on_device(torch.device("meta"), force_custom_init_on_device=True), cache_on_meta:
        instance.load_module()
    instance.get(bucket)
    return instance, wrapper.input_generator()[bucket]


def _on_meta(function: Callable[..., None]) -> Callable[..., None]:
    def on_meta(*args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            function(*args, **kwargs)

    return on_meta


def _application(request: Request) -> NeuronBaseForCausalLM:
    causal_lm = _causal_lm_class(request.impl)
    config_class = causal_lm.get_config_cls()
    fields = {"seq_len": request.length, "max_context_length": request.length, "batch_size": request.batch}
    if request.prefix:
        fields |= {"seq_len": request.prefix + request.length, "prefix_buckets": [request.prefix]}
        fields |= {"is_prefix_caching": True, "is_block_kv_layout": True}
    fields |= {"tp_degree": request.tp_degree, "torch_dtype": torch.bfloat16, "logical_nc_config": 2}
    if request.phase == "speculate":
        fields["enable_eagle_speculation"] = True
    neuron_config = config_class.get_neuron_config_cls()(**fields | request.neuron_config)
    _check_names(request.neuron_config, neuron_config)
    set_compile_env_vars(neuron_config)  # as compile() does
    return causal_lm("", config_class(neuron_config, load_config=_load_config(request)))


def _check_names(given: dict[str, Any], neuron_config: Any) -> None:
    """NxDI ignores names that it does not know, and the figures would be those of another graph."""
    known = {*vars(neuron_config), *(f"disable_{name}" for name in vars(neuron_config))}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise GraphCostError(f"--neuron-config: NxDI's NeuronConfig has no {', '.join(unknown)}; remove it")


def _causal_lm_class(impl: str | None) -> type[NeuronBaseForCausalLM]:
    """The causal LM that a modeling_deepseek.py defines, or hands out under the name that ours has."""
    if impl is None:
        package = __package__.rpartition(".")[0]
    else:
        # By its folder's name, which the modules inside may use to import each other.
        folder = Path(impl).resolve()
        sys.path.insert(0, str(folder.parent))
        package = folder.name
    module = importlib.import_module(f"{package}.modeling_deepseek")
    defined = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    classes = [value for value in defined if isinstance(value, type) and issubclass(value, NeuronBaseForCausalLM)]
    found = classes[0] if classes else getattr(module, _OUR_CLASS, None)
    if found is None:
        raise GraphCostError(f"{module.__file__} defines no subclass of NxDI's NeuronBaseForCausalLM")
    return found


def _load_config(request: Request) -> Any:
    """The hook that fills an InferenceConfig. A graph of one layer needs the layers up to it."""
    fields = dict(request.config)
    fields.pop("torch_dtype", None)
    fields.pop("quantization_config", None)
    if request.part != "model":
        fields["num_hidden_layers"] = request.layer + 1

    def load_config(config: Any) -> None:
        vars(config).update(fields)

    return load_config


def _layer_inputs(request: Request, neuron_config: Any, cache: list[Tensor]) -> dict[str, Any]:
    batch, length = request.batch, request.length
    is_prompt = request.phase == "prefill"
    if neuron_config.is_block_kv_layout:
        if not request.prefix:
            raise GraphCostError(f"graph {request}: a layer does not read blocks, the model does; take part model")
        cache = [torch.empty(batch, 1, request.prefix, tensor.shape[-1], dtype=tensor.dtype) for tensor in cache]
    new = length if is_prompt else 1
    ranks = request.tp_degree if neuron_config.sequence_parallel_enabled else 1
    shards = _shards(neuron_config)
    mask = (batch, request.prefix) if request.prefix else (batch, 1, new, -(-length // shards))
    inputs = {
        "hidden_states": torch.empty(batch, new // ranks, request.model.hidden_size, dtype=torch.bfloat16),
        "attention_mask": torch.empty(mask, dtype=torch.bool),
        "position_ids": torch.empty(batch, new, dtype=torch.int64),
        "past_key_value": None if is_prompt and not request.prefix else _rows_read(cache, request, shards),
    }
    if shards > 1 and not is_prompt:
        inputs["shard_rank"] = torch.empty(1, dtype=torch.int32)
    return inputs | {"is_for_context_encoding": True} if request.prefix else inputs


def _rows_read(cache: list[Tensor], request: Request, shards: int) -> list[Tensor]:
    """Of this rank; the cache of a rank that shares it has a row more."""
    rows = -(-(request.prefix or request.length) // shards)
    return [tensor[:, :, :rows] for tensor in cache]


def _shards(neuron_config: Any) -> int:
    """Other packages have no such field."""
    return getattr(neuron_config, "kv_seq_shards", 1)
