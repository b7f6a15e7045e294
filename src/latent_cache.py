"""Where the latent of attention is kept: one sequence behind the other, or in blocks of a pool.

Both keep k_pe [.., P] in the K slot and the normalised latent [.., R] in the V slot: once, for all heads, the same on
every rank. Shape suffixes: B batch, L cached keys, P qk_rope_head_dim, R kv_lora_rank.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backend

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
