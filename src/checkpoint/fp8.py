"""Block-scaled FP8 weights as in the released checkpoints (DeepSeek-V3, arXiv:2412.19437, section 3.3).

A weight is float8_e4m3fn [rows, cols]; `weight_scale_inv` holds one factor per block [ceil(rows/bh), ceil(cols/bw)],
float32, bfloat16 or E8M0 (a bare exponent byte, value 2^(byte - 127)). Value = float32(weight) * factor; the last block
of a row or column may be partial.
"""

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .kernels import decode_blocks, has_fp8_nan

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8)
SCALE_SUFFIX = "_scale_inv"
_VALUES = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).to(torch.float32).numpy()


def dequantize_blocks(
    weight: Tensor,
    scale_inv: Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Tensor:
    """float32(weight) * scale, rounded once to `dtype`. `name` is what an error calls the tensor.

    Raises CheckpointError when the scale does not fit the weight, or when weight or scale hold a NaN.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return dequantize_blocks(weight, scale_inv, block_size, torch.float32, name).to(dtype)
    scale = scale_to_float32(scale_inv)
    expected = scale_shape(tuple(weight.shape), block_size)
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"{name}{SCALE_SUFFIX}: shape {list(scale.shape)}, but a weight {list(weight.shape)} in blocks of "
            f"{list(block_size)} needs {list(expected)}; check weight_block_size in config.json"
        )
    if not scale.isfinite().all():
        raise CheckpointError(f"{name}{SCALE_SUFFIX}: holds NaN or infinity; the shard is damaged, download it again")
    codes = weight.contiguous().view(torch.uint8).numpy()
    check_codes(codes, name)
    tables = decoding_tables(scale.numpy().T, dtype)
    out = np.empty(codes.shape, tables.dtype)
    decode_blocks(codes.T, tables, 0, 0, *reversed(block_size), out.T)
    return torch.from_numpy(out.view(f"i{out.itemsize}")).view(dtype)


def decoding_tables(scale: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What each of the 256 codes stands for in each block: bits of `dtype` (float32 or bfloat16), [*scale.shape, 256].

    A block has thousands of weights, so the product and its one rounding are computed once per code, not per weight.
    """
    with np.errstate(over="ignore"):
        return float_bits(_VALUES * np.ascontiguousarray(scale)[..., None], dtype)


def float_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The bits of float32 values without NaN, rounded to `dtype`, ties to even: uint32, for bfloat16 uint16."""
    bits = values.view(np.uint32)
    if dtype == torch.float32:
        return bits
    return ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)


def check_codes(codes: np.ndarray, name: str) -> None:
    """Raises CheckpointError when uint8 FP8 codes hold NaN (e4m3fn has one per sign and no infinity)."""
    if has_fp8_nan(codes.reshape(-1)):
        raise CheckpointError(f"{name}: holds NaN; the shard is damaged, download it again")


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
