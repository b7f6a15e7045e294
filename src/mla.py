"""Multi-head latent attention as pure tensor functions (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Shape suffixes: B batch, S queries (and new keys), L cached keys, N heads on this rank,
D qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank.

Per head, kv_b_proj splits into W_uk [D, R] and W_uv [V, R]; with the normalised latent c and the rotated key part k_pe,

    k = [W_uk c ; k_pe]        v = W_uv c        score = (q_nope . W_uk c + q_pe . k_pe) * scale

Expanded (prefill): build k and v once per key, S*N*(D+V)*R multiplications, and attend with D+P and V wide heads.
Absorbed (decode):  q_nope . (W_uk c) = (W_uk^T q_nope) . c, so a query is moved into latent space instead, the cached
latents are read as they are, and W_uv is applied once to the weighted sum.
Both give the same numbers up to rounding. Softmax runs in float32 whatever the dtype.
"""

import torch
from torch import Tensor

# A prompt's queries are attended in blocks of this many, so that only one block's scores are in memory and later keys
# are skipped. Long prompts get larger blocks, not more: a traced graph unrolls each.
QUERY_BLOCK = 512
MAX_QUERY_BLOCKS = 32


def query_growth(position_ids: Tensor, beta: float, original_length: int) -> Tensor:
    """What queries are multiplied with: 1 + beta * log(1 + floor(position / original_length)), float32 [B, 1, S, 1].

    position_ids: int [B, S]; padding, at -1, counts as 0. (Mistral-Small-4, as Llama 4.) The half keeps each quotient
    away from whole numbers, so that floor is right also where division is not exact.
    """
    positions = position_ids.clamp(min=0).to(torch.float32)[:, None, :, None]
    return 1 + beta * torch.log1p(torch.floor((positions + 0.5) / original_length))


def expanded_attention(
    q_nope_BNSD: Tensor,
    q_pe_BNSP: Tensor,
    k_nope_BNKD: Tensor,
    k_pe_B1KP: Tensor,
    v_BNKV: Tensor,
    scale: float,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Causal attention among S tokens of a prompt, and to what is cached ahead of them.

    Of the K keys the last S are the tokens' own; the K - S ahead of them are the cached prefix, of which prefix_mask
    (bool [B, 1, 1, K - S], None for no prefix) tells what counts. Padding is on the right, so no token attends to it.
    Returns [B, N, S, V].
    """
    length = q_nope_BNSD.shape[2]
    prefix = k_nope_BNKD.shape[2] - length
    rows = max(QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    q = torch.cat((q_nope_BNSD, q_pe_BNSP), dim=-1)
    k = torch.cat((k_nope_BNKD, k_pe_B1KP.expand(-1, k_nope_BNKD.shape[1], -1, -1)), dim=-1)
    blocks = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        scores = q[:, :, start:end] @ k[:, :, : prefix + end].mT
        mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        if prefix_mask is not None:
            cached = prefix_mask.expand(-1, -1, end - start, -1)
            mask = torch.cat((cached, mask.expand(len(cached), 1, -1, -1)), dim=-1)
        probs = _scaled_scores(scores, mask, scale).softmax(dim=-1).to(v_BNKV.dtype)
        blocks.append(probs @ v_BNKV[:, :, : prefix + end])
    return torch.cat(blocks, dim=2)


def expands_prefix(queries: int, nope_dim: int, v_dim: int, rank: int) -> bool:
    """Whether a prompt behind a cached prefix takes fewer multiplications expanded than absorbed.

    Per head and cached key, expanding costs rank * (nope_dim + v_dim) once, and spares each query the difference of
    widths: 2 * rank instead of nope_dim + v_dim. (The released model: from 171 queries on.)
    """
    return queries * (2 * rank - nope_dim - v_dim) > rank * (nope_dim + v_dim)


def absorbed_attention(
    q_nope_BNSD: Tensor,
    q_pe_BNSP: Tensor,
    w_uk_NDR: Tensor,
    w_uv_NVR: Tensor,
    cached: tuple[Tensor, Tensor],
    active: tuple[Tensor, Tensor],
    cached_mask: Tensor,
    active_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of S new tokens over a latent cache and over each other.

    cached, active: (k_pe, latent) of the cached [B, 1, L, P], [B, 1, L, R] and of the new tokens, S long. A cache of
    batch 1 is a pool that all sequences read.
    cached_mask: bool, broadcastable to [B, N, S, L]; active_mask likewise to [B, N, S, S], None for a single new token,
    which always sees itself. Returns [B, N, S, V].
    """
    q_latent_BNSR = q_nope_BNSD @ w_uk_NDR
    cached_scores = _latent_scores(q_latent_BNSR, q_pe_BNSP, cached, cached_mask, scale)
    active_scores = _latent_scores(q_latent_BNSR, q_pe_BNSP, active, active_mask, scale)
    probs = torch.cat((cached_scores, active_scores), dim=-1).softmax(dim=-1).to(q_latent_BNSR.dtype)
    cached_probs, active_probs = probs.tensor_split((cached_scores.shape[-1],), dim=-1)
    out_latent_BNSR = _shared_matmul(cached_probs, cached[1]) + _shared_matmul(active_probs, active[1])
    return out_latent_BNSR @ w_uv_NVR.mT


def partial_attention(
    q_latent_BNSR: Tensor, q_pe_BNSP: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys alone: the weighted sum of their latents, [B, N, S, R], and the log of the sum of
    exponentials, float32 [B, N, S], with which it becomes a part of a softmax over more.

    keys: (k_pe, latent), [B or 1, 1, L, P] and [B or 1, 1, L, R]; mask: bool, broadcastable to [B, N, S, L], None where
    all keys count. Where none does, both are finite, and the logarithm is about the lowest number.
    """
    latent = keys[1]
    scores = _latent_scores(q_latent_BNSR, q_pe_BNSP, keys, mask, scale)
    most = scores.amax(-1, keepdim=True)
    exponentials = (scores - most).exp()
    total = exponentials.sum(-1, keepdim=True)
    out_latent_BNSR = _shared_matmul((exponentials / total).to(latent.dtype), latent)
    return out_latent_BNSR, (most + total.log()).squeeze(-1)


def _latent_scores(
    q_latent_BNSR: Tensor, q_pe_BNSP: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None, scale: float
) -> Tensor:
    """Scores of queries in latent space, float32 [B, N, S, L]."""
    k_pe, latent = keys
    scores = _shared_matmul(q_latent_BNSR, latent.mT) + _shared_matmul(q_pe_BNSP, k_pe.mT)
    return _scaled_scores(scores, mask, scale)


def _shared_matmul(x_BNSd: Tensor, y_B1de: Tensor) -> Tensor:
    """x @ y, [B, N, S, e]: one product for all heads, and for all sequences where y has batch 1. A broadcast matmul
    would copy y, the whole cache, for each."""
    if len(y_B1de) < len(x_BNSd):
        return (x_BNSd.flatten(0, 2) @ y_B1de[0, 0]).unflatten(0, x_BNSd.shape[:3])
    return (x_BNSd.flatten(1, 2) @ y_B1de.squeeze(1)).unflatten(1, x_BNSd.shape[1:3])


def _scaled_scores(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scores in float32, ready for softmax. Overwrites them where they are float32: there are no larger tensors."""
    scores = scores.to(torch.float32).mul_(scale)
    # The lowest finite number, not -inf: a padded query row that sees no key must not turn into NaN.
    return scores if mask is None else scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
