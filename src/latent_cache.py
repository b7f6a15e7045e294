"""Where the latent of attention is kept: one sequence behind the other, or in blocks of a pool.

Both keep k_pe [.., P] in the K slot and the normalised latent [.., R] in the V slot: once, for all heads, the same on
every rank. Shape suffixes: B batch, L cached keys, P qk_rope_head_dim, R kv_lora_rank.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backend
from .sharded_attention import own_rows, owned_place, rows_of

if TYPE_CHECKING:
    from .config import DeepseekV3InferenceConfig

KeyValue = tuple[Tensor, Tensor]

# Gathering a batch's blocks reads and writes them once more than attending needs. Reading the whole pool instead costs
# what others' blocks in it weigh.
_POOL_READS = 1.5


class LatentKVCacheManager(backend.KVCacheManager):
    """A slot of L = max_length tokens for each sequence: k_pe [slots, 1, L, P], latent [slots, 1, L, R]."""

    def _init_kv_shape(self, config: "DeepseekV3InferenceConfig", layer_to_cache_size_mapping: Any = None) -> None:
        neuron_config = config.neuron_config
        self.padded_layer_ids = []
        slots = (neuron_config.kv_cache_batch_size, 1, neuron_config.max_length)
        self.k_shape = (*slots, config.model.qk_rope_head_dim)
        self.v_shape = (*slots, config.model.kv_lora_rank)


class PagedLatentKVCacheManager(backend.BlockKVCacheManager):
    """A pool of blocks that sequences take as they grow, and share: k_pe [blocks + 1, block_size, 1, P], latent
    [blocks + 1, block_size, 1, R]. What shall not be kept is written to the last block."""

    def _init_kv_shape(self, config: "DeepseekV3InferenceConfig", layer_to_cache_size_mapping: Any = None) -> None:
        neuron_config = config.neuron_config
        self.padded_layer_ids = []
        blocks = (neuron_config.pa_num_blocks + self._NUM_EXTRA_RESERVED_BLOCK, neuron_config.pa_block_size, 1)
        self.k_shape = (*blocks, config.model.qk_rope_head_dim)
        self.v_shape = (*blocks, config.model.kv_lora_rank)

    def get_cache(self, active_block_table: Tensor, **kw: Any) -> list[KeyValue]:
        """(k_pe, latent) of each layer. A decoding step may get the whole pool, [1, 1, L, ..] (attends_pool); else the
        blocks of active_block_table, int [B, blocks], side by side, [B, 1, L, ..]."""
        if kw.get("is_for_context_encoding") or not self.attends_pool(active_block_table):
            return super().get_cache(active_block_table=active_block_table, **kw)
        tensors = [tensor.flatten(0, 1).transpose(0, 1).unsqueeze(0) for tensor in self.past_key_values]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _update_cache_into_block_layout(
        self, latest: Tensor, cache: Tensor, slot_mapping: Tensor, padding_id: int = -1
    ) -> Tensor:
        """NxDI's hook, which itself writes a reshaped cache: what it returns would be no update in place.

        latest [B, 1, S, ..] goes to slot_mapping, int [B, S], of cache [blocks + 1, block_size, 1, ..].
        """
        pool, size = cache.shape[:2]
        slots = torch.where(slot_mapping == padding_id, (pool - 1) * size, slot_mapping)
        return torch.index_put(cache, (slots // size, slots % size), latest.transpose(1, 2))

    def attends_pool(self, block_table: Tensor) -> bool:
        """Whether a decoding step over these blocks, int [B, blocks], reads the whole pool: decided by sizes alone."""
        return self.k_shape[0] <= _POOL_READS * block_table.numel()

    def pool_mask(self, block_table: Tensor, lengths: Tensor) -> Tensor:
        """Which of the pool's keys a decoding step attends to, bool [B, 1, 1, L].

        block_table: int [B, blocks], each sequence's blocks in order; lengths: int [B], tokens that it has cached.
        """
        pool, size = self.k_shape[:2]
        batch, width = block_table.shape
        order = torch.arange(width, dtype=torch.int32, device=block_table.device).expand(batch, -1)
        lengths = lengths[:, None].to(torch.int32)
        # Entries behind the sequence's end name any block; they go to the last one, which nobody reads.
        places = torch.where(order * size < lengths, block_table.to(torch.int64), pool - 1)
        nowhere = torch.full((batch, pool), width, dtype=torch.int32, device=block_table.device)
        order_of_block = nowhere.scatter(1, places, order)
        order_of_block = torch.cat((order_of_block[:, :-1], nowhere[:, -1:]), dim=1)
        offsets = torch.arange(size, dtype=torch.int32, device=block_table.device)
        positions = (order_of_block[:, :, None] * size + offsets).flatten(1)
        return (positions < lengths)[:, None, None, :]


class ShardedLatentKVCacheManager(LatentKVCacheManager):
    """Of each sequence, the tokens that this rank holds (sharded_attention.py): [slots, 1, ceil(L / G) + 1, ..]. The
    last row takes what is another rank's."""

    def _init_kv_shape(self, config: "DeepseekV3InferenceConfig", layer_to_cache_size_mapping: Any = None) -> None:
        super()._init_kv_shape(config, layer_to_cache_size_mapping)
        self.shards = config.neuron_config.kv_seq_shards
        self.rows = rows_of(self.k_shape[2], self.shards)
        self.k_shape, self.v_shape = ((*shape[:2], self.rows + 1, shape[3]) for shape in (self.k_shape, self.v_shape))

    def get_cache(self, seq_len: int, **kw: Any) -> list[KeyValue]:
        """The rows of the first seq_len positions."""
        return super().get_cache(seq_len=rows_of(seq_len, self.shards), **kw)

    def update_cache(
        self,
        *,
        is_for_context_encoding: bool,
        position_ids: Tensor,
        new_key_values: list[KeyValue],
        shard_rank: Tensor,
        **kw: Any,
    ) -> Any:
        """As the base class's, of all new tokens; shard_rank: int [1], this rank's number in its group."""
        if is_for_context_encoding:
            new_key_values = [tuple(own_rows(x, self.shards, shard_rank) for x in pair) for pair in new_key_values]
        else:
            position_ids = owned_place(position_ids, self.shards, shard_rank, otherwise=self.rows)
        kw["seq_len"] = self.rows + 1
        return super().update_cache(
            is_for_context_encoding=is_for_context_encoding,
            position_ids=position_ids,
            new_key_values=new_key_values,
            **kw,
        )


class ShardedPagedLatentKVCacheManager(PagedLatentKVCacheManager):
    """Of each block, the tokens that this rank holds (sharded_attention.py): [blocks + 1, block_size / G, 1, ..]. A
    block's first position is a multiple of G, so that its offsets are dealt as positions are."""

    def _init_kv_shape(self, config: "DeepseekV3InferenceConfig", layer_to_cache_size_mapping: Any = None) -> None:
        super()._init_kv_shape(config, layer_to_cache_size_mapping)
        self.shards = config.neuron_config.kv_seq_shards
        self.k_shape, self.v_shape = (
            (shape[0], shape[1] // self.shards, *shape[2:]) for shape in (self.k_shape, self.v_shape)
        )

    def update_cache(self, *, scatter_index: Tensor, shard_rank: Tensor, **kw: Any) -> Any:
        """As the base class's. scatter_index: int [B, S], slots of a pool that is not split; shard_rank: int [1]."""
        slots = owned_place(scatter_index, self.shards, shard_rank, otherwise=-1)
        return super().update_cache(scatter_index=torch.where(scatter_index < 0, -1, slots), **kw)


def latent_cache_manager(neuron_config: Any) -> type[backend.KVCacheManager]:
    """The class of the cache that a NeuronConfig asks for."""
    if neuron_config.is_block_kv_layout:
        return PagedLatentKVCacheManager if neuron_config.kv_seq_shards == 1 else ShardedPagedLatentKVCacheManager
    return LatentKVCacheManager if neuron_config.kv_seq_shards == 1 else ShardedLatentKVCacheManager
