"""What kind of value each NeuronConfig field takes: NxDI takes others as they come, and fails later or silently."""

from collections.abc import Mapping
from typing import Any

from .dtypes import MODEL_DTYPES, dtype_name
from .errors import ConfigError

_COUNTS = (
    "batch_size",
    "ctx_batch_size",
    "tkg_batch_size",
    "max_batch_size",
    "kv_cache_batch_size",
    "seq_len",
    "max_context_length",
    "max_length",
    "n_positions",
    "tp_degree",
    "pa_num_blocks",
    "pa_block_size",
    "kv_seq_shards",
)
_FLAGS = (
    "enable_bucketing",
    "is_continuous_batching",
    "is_prefix_caching",
    "is_block_kv_layout",
    "sequence_parallel_enabled",
    "on_cpu",
    "output_logits",
    "save_sharded_checkpoint",
    "skip_sharding",
    "async_mode",
    "allow_input_truncation",
    "enable_eagle_speculation",
)
# float16 only on the device.
_DTYPES = (*MODEL_DTYPES, "float16")
_BUCKETS = ("context_encoding_buckets", "token_generation_buckets", "prefix_buckets")


def check_values(fields: Mapping[str, Any]) -> None:
    """fields: keyword arguments of NeuronConfig. Raises ConfigError for a value that is not of its field's kind."""
    for name in _COUNTS:
        if name in fields and not _is_count(fields[name]):
            raise ConfigError(f"neuron_config: {name} {fields[name]!r} must be an integer of at least 1")
    for name in _FLAGS:
        if not isinstance(fields.get(name, False), bool):
            raise ConfigError(f"neuron_config: {name} {fields[name]!r} must be True or False")
    for name in _BUCKETS:
        buckets = fields.get(name)
        if buckets is not None and not _ascend(buckets):
            raise ConfigError(f"neuron_config: {name} {buckets!r} must be lengths in ascending order, [128, 512]")
    dtype = dtype_name(fields.get("torch_dtype", MODEL_DTYPES[0]))
    if dtype not in _DTYPES:
        raise ConfigError(f"neuron_config: torch_dtype {dtype!r} is not supported; use {' or '.join(MODEL_DTYPES)}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _ascend(buckets: Any) -> bool:
    if not isinstance(buckets, list | tuple) or not buckets or not all(map(_is_count, buckets)):
        return False
    return list(buckets) == sorted(set(buckets))
