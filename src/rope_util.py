"""Rotary position embedding of DeepSeek-V3: YaRN frequencies and the interleaved rotation.

YaRN: Peng et al., arXiv:2309.00071, sections 3.2 (NTK-by-parts) and 3.4 (attention temperature), with the
`mscale` / `mscale_all_dim` pair that DeepSeek-V2 added (modeling_deepseek.py of the released checkpoints).

Shape suffixes: B batch, S sequence, N heads, D rotary head dim.
"""

import math

import torch
from torch import Tensor

from .model_config import YarnScaling


def inverse_frequencies(dim: int, theta: float, scaling: YarnScaling | None = None) -> Tensor:
    """Angular frequency of each of the dim/2 rotated pairs, float32 [dim/2], on the CPU.

    Without `scaling`: theta^(-2i/dim). With it, pairs that turn more than `beta_fast` times within the original
    context keep that frequency, those that turn less than `beta_slow` times are slowed down by `factor`, and a linear
    ramp joins the two.
    """
    extrapolated = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if scaling is None:
        return extrapolated
    keep = 1.0 - _interpolation_ramp(dim, theta, scaling)
    return extrapolated / scaling.factor * (1.0 - keep) + extrapolated * keep


def _interpolation_ramp(dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """Share of interpolation per pair, 0 (keep) to 1 (divide by factor), float32 [dim/2]."""

    def pair_of(rotations: float) -> float:
        wavelengths = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
    width = (high - low) or 0.001  # low == high, possible when beta_fast == beta_slow, would divide by zero
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)


class DeepseekV3RotaryEmbedding(torch.nn.Module):
    """Cosines and sines of the positions that a step uses.

    The frequencies are Python floats, not a buffer: they become constants of a traced graph, survive a build on the
    meta device, and no cast of the module to bfloat16 can touch them.
    """

    def __init__(self, dim: int, theta: float, scaling: YarnScaling | None = None):
        super().__init__()
        self.inv_freq = inverse_frequencies(dim, theta, scaling).tolist()
        self.attention_factor = 1.0 if scaling is None else scaling.attention_factor

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: int [B, S], each row its own sequence's positions. Returns float32 cos, sin [B, 1, S, D/2]."""
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=position_ids.device)
        angles = position_ids[:, None, :, None].to(torch.float32) * inv_freq
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def rotate_interleaved(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) by the angles of `cos`, `sin` [B, 1, S, D/2]; keeps shape and dtype.

    The pairs stay interleaved. Hugging Face moves them to two halves first, which permutes queries and keys alike and
    leaves every score unchanged.
    """
    even, odd = x_BNSD.to(torch.float32).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_BNSD.dtype)
