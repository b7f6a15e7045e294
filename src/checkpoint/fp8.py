"""Block-scaled FP8 weights as in the released checkpoints (DeepSeek-V3, arXiv:2412.19437, section 3.3).

A weight is float8_e4m3fn [rows, cols]; `weight_scale_inv` holds one factor per block [ceil(rows/bh), ceil(cols/bw)],
float32, bfloat16 or E8M0 (a bare exponent byte, value 2^(byte - 127)). Value = float32(weight) * factor, rounded once;
the last block of a row or column may be partial. Which other ways of storing there are says stored.py; decoding is in
encodings.py.
"""

import torch
from torch import Tensor

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
SCALE_SUFFIX = "_scale_inv"
CODE_VALUES = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).to(torch.float32).numpy()


def quantize_blocks(weight: Tensor, block_size: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn weight, float32 scale_inv) such that each block's largest magnitude maps to 448."""
    rows, cols = weight.shape
    (bh, bw), (block_rows, block_cols) = block_size, scale_shape((rows, cols), block_size)
    padded = weight.new_zeros(block_rows * bh, block_cols * bw, dtype=torch.float32)
    padded[:rows, :cols] = weight
    amax = padded.view(block_rows, bh, block_cols, bw).abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, amax / FP8_MAX, 1.0)
    codes = weight.to(torch.float32) / _spread(scale, weight.shape, block_size)
    return codes.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scale


def scale_shape(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale of a 2-D weight: the number of blocks, partial ones included, along each axis."""
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def scale_to_float32(scale: Tensor) -> Tensor:
    """Block factors as float32; E8M0 arrives as float8_e8m0fnu or as raw uint8 exponents."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def _spread(scale: Tensor, shape: torch.Size, block_size: tuple[int, int]) -> Tensor:
    """Repeats each factor over its block and cuts partial blocks: float32 [rows, cols]."""
    rows = scale.repeat_interleave(block_size[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block_size[1], dim=1)[:, : shape[1]]
