"""How many ranks should share a latent cache by sequence: the bytes spared against the collectives that it takes.

Per layer and decoding step. Every rank reads the cache that it holds once; with more than one shard, there are three
collectives (sharded_attention.py). What is assumed, and only hardware can tell: reading a cache is bound by memory
bandwidth and does not overlap with a collective, and a collective has the same latency in a group of any size, also
where the group is one chip.
"""

from ..dtypes import BY_TORCH
from ..errors import ConfigError
from ..graph_cost.time_model import Machine
from ..model_config import ModelConfig

SHARDS = (1, 4, 16, 64)
AUTO = "auto"
_FLOAT32_BYTES = 4


def possible_shards(tp_degree: int, block_size: int = 0) -> list[int]:
    """block_size: tokens of a block, 0 for an unpaged cache."""
    return [shards for shards in SHARDS if tp_degree % shards == block_size % shards == 0]


def check_divides(shards: int, tp_degree: int, block_size: int = 0) -> None:
    """Raises ConfigError where groups of `shards` ranks, or their parts of a block, would be uneven."""
    for name, size in (("tp_degree", tp_degree), ("the block size", block_size)):
        if size % shards:
            possible = " or ".join(map(str, possible_shards(tp_degree, block_size)))
            raise ConfigError(f"kv_seq_shards {shards} does not divide {name} {size}; use {possible}")


def fastest_shards(
    config: ModelConfig,
    tp_degree: int,
    batch: int,
    length: int,
    machine: Machine | None = None,
    dtype: str = "bfloat16",
    block_size: int = 0,
) -> int:
    """The number that step_seconds is smallest for, the smaller of two alike. length: tokens of each sequence."""
    machine = machine or Machine()
    return min(
        possible_shards(tp_degree, block_size),
        key=lambda shards: step_seconds(config, tp_degree, shards, batch, length, machine, dtype),
    )


def step_seconds(
    config: ModelConfig, tp_degree: int, shards: int, batch: int, length: int, machine: Machine, dtype: str = "bfloat16"
) -> float:
    """What a layer's step takes for the cache and the collectives of its shards, as a bound."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache = batch * -(-length // shards) * width * BY_TORCH[dtype].item_bytes
    payloads = _payloads(config, tp_degree, shards, batch, dtype) if shards > 1 else []
    collectives = sum(machine.collective_seconds + payload / machine.link_bytes for payload in payloads)
    return cache / machine.hbm_bytes + collectives


def _payloads(config: ModelConfig, tp_degree: int, shards: int, batch: int, dtype: str) -> list[int]:
    """Bytes of the queries that are gathered, of the log-sum-exps, and of the weighted sums before they are added."""
    queries = batch * shards * config.padded_heads(tp_degree) // tp_degree
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return [
        queries * width * BY_TORCH[dtype].item_bytes,
        shards * queries * _FLOAT32_BYTES,
        queries * config.kv_lora_rank * _FLOAT32_BYTES,
    ]
