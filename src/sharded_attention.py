"""Decoding over a latent cache that is split over the ranks by sequence, as pure tensor functions.

The ranks of a group of G share each sequence's tokens: position p is on rank p mod G, in its row p // G. Each rank
attends to its own rows with the queries of all the group's heads. By their log-sum-exp the parts become one softmax
(Milakov and Gimelshein, arXiv:1805.02867); a reduce-scatter over the heads adds them up, in float32, since a sum of G
parts in bfloat16 costs more than the rest of attention. The step's new tokens, which every rank has, are merged behind
that on each rank's own heads, so that no row is counted twice and a rank may hold none.

Shape suffixes: B batch, S new tokens, L cached rows on this rank, N heads on this rank, D qk_nope_head_dim,
P qk_rope_head_dim, V v_head_dim, R kv_lora_rank, G ranks of the group.
"""

from typing import Protocol

import torch
from torch import Tensor

from .mla import partial_attention

Part = tuple[Tensor, Tensor]  # a softmax's weighted sum, and the log of its sum of exponentials


class ShardCollectives(Protocol):
    """The group of `size` adjacent ranks that share a cache."""

    size: int

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors side by side along one axis, in the order of the ranks."""

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """The sum of the ranks' tensors: of one axis, this rank's part."""


def rows_of(length: int, shards: int) -> int:
    """The most rows that a rank holds of `length` tokens."""
    return -(-length // shards)


def held_rows(lengths: Tensor, shards: int, shard_rank: Tensor) -> Tensor:
    """How many of the first `lengths` tokens, int [..], the rank of this number in its group, int [..], holds."""
    return torch.div(lengths + (shards - 1) - shard_rank, shards, rounding_mode="floor")


def owned_place(places: Tensor, shards: int, shard_rank: Tensor, otherwise: int) -> Tensor:
    """Where this rank keeps what has the places, int [B, S], in a cache that is not split: `otherwise` for what is
    another rank's."""
    own = torch.remainder(places, shards) == shard_rank
    return torch.where(own, torch.div(places, shards, rounding_mode="floor"), otherwise)


def own_rows(x: Tensor, shards: int, shard_rank: Tensor) -> Tensor:
    """This rank's rows of a prompt's keys: [B, 1, S, d] to [B, 1, ceil(S / G), d]. The last one may be no token of it,
    and lies behind the sequence's end."""
    length = x.shape[2]
    index = torch.arange(0, rows_of(length, shards) * shards, shards, device=x.device) + shard_rank
    return x.index_select(2, index.clamp(max=length - 1))


def gathered_rows(rows: tuple[Tensor, Tensor], group: ShardCollectives) -> tuple[Tensor, Tensor]:
    """All ranks' rows of (k_pe, latent), rank by rank: [B, 1, L, d] to [B, 1, G * L, d], in one collective."""
    k_pe, latent = group.gather(torch.cat(rows, dim=-1), dim=2).tensor_split((rows[0].shape[-1],), -1)
    return k_pe, latent


def by_rank(mask: Tensor, shards: int) -> Tensor:
    """A mask over positions, [B, L * G], as one over the ranks' rows, rank by rank."""
    return mask.unflatten(-1, (-1, shards)).mT.flatten(-2)


def sharded_attention(
    q_nope_BNSD: Tensor,
    q_pe_BNSP: Tensor,
    w_uk_NDR: Tensor,
    w_uv_NVR: Tensor,
    cached: tuple[Tensor, Tensor],
    active: tuple[Tensor, Tensor],
    cached_mask: Tensor,
    active_mask: Tensor | None,
    scale: float,
    group: ShardCollectives,
    shard_rank: Tensor,
) -> Tensor:
    """As mla.absorbed_attention, with `cached` and `cached_mask` of this rank's rows. shard_rank: int [1], this rank's
    number in its group. Three collectives: of queries, of log-sum-exps (float32), of weighted sums (float32)."""
    heads = q_nope_BNSD.shape[1]
    q_latent_BNSR = q_nope_BNSD @ w_uk_NDR
    rank = q_latent_BNSR.shape[-1]
    queries = group.gather(torch.cat((q_latent_BNSR, q_pe_BNSP), dim=-1), dim=1)
    partial, own_lse = partial_attention(*queries.tensor_split((rank,), -1), cached, cached_mask, scale)
    lse = combined(group.gather(own_lse.unsqueeze(0), dim=0))
    weighted = partial.to(torch.float32) * weight(own_lse, lse)
    out_latent = group.reduce_scatter(weighted, dim=1)
    own_heads = torch.arange(heads, device=shard_rank.device) + shard_rank * heads
    new = partial_attention(q_latent_BNSR, q_pe_BNSP, active, active_mask, scale)
    out_BNSR = merged((out_latent, lse.index_select(1, own_heads)), new)
    return out_BNSR.to(q_latent_BNSR.dtype) @ w_uv_NVR.mT


def combined(lse: Tensor) -> Tensor:
    """The log-sum-exp over all shards, [..], of each shard's, float32 [G, ..]."""
    most = lse.amax(0)
    return most + (lse - most).exp().sum(0).log()


def weight(lse: Tensor, total: Tensor) -> Tensor:
    """The factor of a shard's weighted sum, [.., 1]. A shard that holds nothing has the lowest finite number for lse,
    hence 0."""
    return (lse - total).exp().unsqueeze(-1)


def merged(cached: Part, new: Part) -> Tensor:
    """The weighted sum over the keys of two softmaxes, float32."""
    total = combined(torch.stack((cached[1], new[1])))
    return sum(part.to(torch.float32) * weight(lse, total) for part, lse in (cached, new))
