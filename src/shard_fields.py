"""What a latent cache that is split over the ranks by sequence asks of the NeuronConfig's other fields."""

from typing import Any

from .errors import ConfigError


def check_shards(neuron_config: Any) -> None:
    """Raises ConfigError where kv_seq_shards ranks cannot share a cache."""
    shards, tp_degree = neuron_config.kv_seq_shards, neuron_config.tp_degree
    if shards == 1:
        return
    if tp_degree % shards:
        raise ConfigError(
            f"neuron_config: kv_seq_shards {shards} does not divide tp_degree {tp_degree}; groups of so many ranks "
            "share a cache, choose 1, 4, 16 or 64 that does"
        )
    if neuron_config.is_block_kv_layout and neuron_config.pa_block_size % shards:
        raise ConfigError(
            f"neuron_config: pa_block_size {neuron_config.pa_block_size} is no multiple of kv_seq_shards {shards}; "
            "each rank keeps a part of every block, change one of them"
        )
    if getattr(neuron_config, "enable_fused_speculation", False):
        raise ConfigError(
            f"neuron_config: enable_fused_speculation with kv_seq_shards {shards} is not supported; set kv_seq_shards "
            "to 1"
        )
