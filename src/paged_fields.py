"""The NeuronConfig's fields of a cache in blocks: what is filled in, and what is refused.

NxDI has one way for it that works, prefix caching: a prompt's tokens attend to blocks that are in the cache already.
Prompts longer than max_context_length go the same way, in chunks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ConfigError

DEFAULT_BLOCK_SIZE = 32
_BOTH = ("is_prefix_caching", "is_block_kv_layout")


def is_paged(fields: Mapping[str, Any]) -> bool:
    """fields: NeuronConfig's keyword arguments. Raises ConfigError where only one of NxDI's two switches is on."""
    if fields.get("chunked_prefill_config") is not None:
        return False  # which is refused by its own name
    on = [name for name in _BOTH if fields.get(name)]
    if len(on) == 1:
        (other,) = set(_BOTH) - set(on)
        raise ConfigError(f"neuron_config: {on[0]} without {other}; set both, or neither for an unpaged cache")
    return bool(on)


def fill_paging(fields: Mapping[str, Any]) -> dict[str, Any]:
    """NeuronConfig's keyword arguments with what follows from a cache in blocks: prompts one by one, and buckets."""
    if not is_paged(fields):
        return dict(fields)
    defaults = {"ctx_batch_size": 1, "is_continuous_batching": True, "pa_block_size": DEFAULT_BLOCK_SIZE}
    missing = {name: value for name, value in defaults.items() if fields.get(name) is None}
    # With one bucket, NxDI's own would be as long as a chunk, and so would be the longest prefix.
    return {**fields, **missing, "enable_bucketing": True}


def fill_sizes(neuron_config: Any, given: Mapping[str, Any]) -> None:
    """Sets the pool and the buckets that were not given, once NxDI has set the lengths."""
    size, longest = neuron_config.pa_block_size, neuron_config.max_length
    if neuron_config.context_encoding_buckets is None:
        neuron_config.context_encoding_buckets = [neuron_config.max_context_length]
    if neuron_config.token_generation_buckets is None:
        neuron_config.token_generation_buckets = [longest]
    if given.get("prefix_buckets") is None:
        neuron_config.prefix_buckets = _prefix_buckets(neuron_config)
    if given.get("pa_num_blocks") is None:
        neuron_config.pa_num_blocks = neuron_config.tkg_batch_size * (longest // size)


def _prefix_buckets(neuron_config: Any) -> list[int]:
    """One chunk, doubled until all but the shortest prompt graph's tokens fit: a graph for each and each chunk."""
    needed = _longest_prefix(neuron_config)
    buckets = []
    length = neuron_config.max_context_length
    while length < needed:
        buckets.append(length)
        length *= 2
    return [*buckets, needed] if needed else buckets


def _longest_prefix(neuron_config: Any) -> int:
    """Of NxDI, which computes cached tokens again where a prompt's graph has room for them."""
    return neuron_config.max_length - min(neuron_config.context_encoding_buckets)


def check_paging(neuron_config: Any) -> None:
    """Raises ConfigError for what NxDI asserts against while it serves, or answers wrong."""
    if neuron_config.ctx_batch_size != 1:
        raise ConfigError(
            f"neuron_config: ctx_batch_size {neuron_config.ctx_batch_size} with is_block_kv_layout; prompts are taken "
            "one by one, set it to 1"
        )
    if getattr(neuron_config, "allow_input_truncation", False):
        raise ConfigError(
            "neuron_config: allow_input_truncation with is_block_kv_layout is not supported; turn it off, "
            "longer prompts are refused"
        )
    if getattr(neuron_config, "async_mode", False):
        raise ConfigError(
            "neuron_config: async_mode with is_block_kv_layout; the next step would use the last one's blocks, turn "
            "it off"
        )
    _check_multiples(neuron_config)
    needed, prefixes = _longest_prefix(neuron_config), neuron_config.prefix_buckets or [0]
    if max(prefixes, default=0) < needed:
        raise ConfigError(
            f"neuron_config: prefix_buckets end at {max(prefixes)}, prompts may have {needed} cached tokens ahead; "
            f"add a bucket of {needed}"
        )
    blocks = neuron_config.tkg_batch_size * (neuron_config.max_length // neuron_config.pa_block_size)
    if neuron_config.pa_num_blocks < blocks:
        raise ConfigError(
            f"neuron_config: pa_num_blocks {neuron_config.pa_num_blocks} cannot hold {neuron_config.tkg_batch_size} "
            f"sequences of {neuron_config.max_length} tokens; raise it to {blocks} or lower seq_len or batch_size"
        )


def _check_multiples(neuron_config: Any) -> None:
    size = neuron_config.pa_block_size
    names = ("context_encoding_buckets", "token_generation_buckets", "prefix_buckets")
    lengths: dict[str, Iterable[int]] = {
        name: [getattr(neuron_config, name)] for name in ("max_length", "max_context_length")
    }
    lengths |= {name: getattr(neuron_config, name) or [] for name in names}
    for name, values in lengths.items():
        for value in values:
            if value % size:
                raise ConfigError(
                    f"neuron_config: {name} {value} is no multiple of pa_block_size {size}; change one of them"
                )
