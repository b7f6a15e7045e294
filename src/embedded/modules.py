"""Norm and KV cache."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467), computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size), requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = F.rms_norm(hidden_states.to(torch.float32), self.weight.shape, eps=self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


def rmsnorm_cls() -> type[nn.Module]:
    return RMSNorm


class KVCacheManager(nn.Module):
    """Two tensors per layer, [slots, heads, max_length, dim] each; `_init_kv_shape` sets k_shape and v_shape.

    A sequence lives in the slot that its seq_id names. Subclasses choose the shapes.
    """

    def __init__(self, config: Any, num_kv_head: int, **kwargs: Any):
        super().__init__()
        self.num_kv_head = num_kv_head
        self._init_kv_shape(config)
        dtype = config.neuron_config.torch_dtype
        shapes = [self.k_shape, self.v_shape] * config.num_hidden_layers
        self.past_key_values = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False) for shape in shapes
        )

    def _init_kv_shape(self, config: Any, layer_to_cache_size_mapping: list[int] | None = None) -> None:
        raise NotImplementedError

    def get_cache(self, seq_len: int, seq_ids: Tensor | slice, **_: Any) -> list[tuple[Tensor, Tensor]]:
        """The first seq_len positions of the slots, (K, V) per layer; views where seq_ids is a slice."""
        tensors = [tensor[seq_ids, :, :seq_len] for tensor in self.past_key_values]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def update_cache(
        self,
        is_for_context_encoding: bool,
        seq_ids: Tensor | slice,
        position_ids: Tensor,
        new_key_values: list[tuple[Tensor, Tensor]],
        **_: Any,
    ) -> None:
        """Writes prompts from position 0 on, new tokens at their positions, in place."""
        new = [tensor for pair in new_key_values for tensor in pair]
        slots = torch.arange(len(position_ids), device=position_ids.device) if isinstance(seq_ids, slice) else seq_ids
        for cache, latest in zip(self.past_key_values, new, strict=True):
            if is_for_context_encoding:
                cache[slots, :, : latest.shape[2]] = latest
            else:
                cache[slots[:, None], :, position_ids] = latest.transpose(1, 2)


class BlockKVCacheManager(KVCacheManager):
    """As KVCacheManager, in blocks: two tensors per layer, [blocks + 1, block_size, heads, dim] each.

    Blocks are named by tables, int [B, blocks], and tokens written to slots: block * block_size + offset, or -1 for a
    token that is not kept.
    """

    _NUM_EXTRA_RESERVED_BLOCK = 1

    def get_cache(self, active_block_table: Tensor, **_: Any) -> list[tuple[Tensor, Tensor]]:
        """The blocks of each sequence side by side, [B, heads, blocks * block_size, dim]; (K, V) per layer."""
        tensors = [tensor[active_block_table].flatten(1, 2).transpose(1, 2) for tensor in self.past_key_values]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def update_cache(self, new_key_values: list[tuple[Tensor, Tensor]], scatter_index: Tensor, **_: Any) -> None:
        """Writes the new tokens [B, heads, S, dim] to the slots of scatter_index, int [B, S], in place."""
        kept = scatter_index >= 0
        new = [tensor for pair in new_key_values for tensor in pair]
        for cache, latest in zip(self.past_key_values, new, strict=True):
            cache.flatten(0, 1)[scatter_index[kept]] = latest.transpose(1, 2)[kept]
