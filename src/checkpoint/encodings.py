"""How weights are stored, and how what was read of one becomes bits of the model's dtype.

The one place that knows: `encoded_rows` chooses by the stored dtype. Another way of storing weights is another branch
there and another class with a `paste`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..dtypes import dtype_name, to_safetensors
from ..errors import CheckpointError
from ..model_config import ModelConfig
from .fp8 import CODE_VALUES, FP8_MAX, SCALE_SUFFIX, scale_to_float32
from .header import TensorEntry
from .numba_kernels import copy_strips, decode_blocks, largest_magnitude
from .source import TensorSource
from .units import Range

# The integers that hold the bits of what comes out.
BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}
_FP8 = "F8_E4M3"
# The bits of the largest number of each format; infinity and NaN lie above.
_LARGEST = {_FP8: 0x7E, "BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}
_DEFAULT_BLOCK = (128, 128)  # the released size


@dataclass(frozen=True)
class Window:
    """Ranges of rows of a matrix, from column `left` on: (first row, values [rows, columns])."""

    parts: list[tuple[int, np.ndarray]]
    left: int

    def rectangle(self, rows: Range, columns: Range) -> np.ndarray:
        first, values = next(part for part in reversed(self.parts) if part[0] <= rows[0])
        return values[rows[0] - first : rows[1] - first, columns[0] - self.left : columns[1] - self.left]


class EncodedRows(Protocol):
    def paste(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        """Decodes a rectangle of the source into `out`, the bits of its place in the tensor."""


def encoded_rows(
    source: TensorSource, name: str, read: Window, config: ModelConfig, dtype: torch.dtype, transposed: bool
) -> EncodedRows:
    """What was read of a weight, to be decoded to `dtype`; `read` holds uint8 [rows, bytes].

    Raises CheckpointError naming the tensor when it holds NaN or infinity, or will in `dtype`.
    """
    what, stored = source.describe(name), source.entries[name].dtype
    if stored == _FP8:
        return _Fp8Rows(read, finite_scale(source, name), weight_block_size(config), dtype, transposed, what)
    return _PlainRows(read, stored, dtype, transposed, what)


class _Fp8Rows:
    """An FP8 matrix with block scales, see fp8.py."""

    def __init__(
        self,
        read: Window,
        scale: np.ndarray,
        block_size: tuple[int, int],
        dtype: torch.dtype,
        transposed: bool,
        what: str,
    ):
        for _, codes in read.parts:
            _check_finite(codes, _FP8, what)
        self._read, self._block_size, self._transposed = read, block_size, transposed
        self._tables = _decoding_tables(scale if transposed else scale.T, dtype)
        self._dtype, self._what = dtype, what
        self._may_overflow = np.abs(scale).max(initial=0) > torch.finfo(dtype).max / FP8_MAX

    def paste(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        codes = self._read.rectangle(rows, columns)
        if self._transposed:
            decode_blocks(codes, self._tables, rows[0], columns[0], *self._block_size, out.T)
        else:
            decode_blocks(codes.T, self._tables, columns[0], rows[0], *reversed(self._block_size), out.T)
        if self._may_overflow:
            _check_fits(out, self._dtype, self._what)


class _PlainRows:
    """A BF16, F16 or F32 tensor."""

    def __init__(self, read: Window, stored: str, dtype: torch.dtype, transposed: bool, what: str):
        parts = [(start, _converted(raw, stored, dtype, what)) for start, raw in read.parts]
        self._read, self._transposed = Window(parts, read.left), transposed

    def paste(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        bits = self._read.rectangle(rows, columns)
        if self._transposed:
            copy_strips(bits, out.T)
        else:
            out[...] = bits


def working_bytes(entry: TensorEntry) -> int:
    """Bytes in memory of a row that was read, before it is pasted: FP8 is decoded from where it was read, the others
    may pass through copies of 4 bytes each."""
    return entry.row_bytes if entry.dtype == _FP8 else entry.row_bytes + 8 * entry.columns


def read_scale(source: TensorSource, name: str) -> np.ndarray:
    """The block scales of a weight, float32 [blocks down, blocks across]."""
    entry = source.entries[name + SCALE_SUFFIX]
    raw = np.empty(entry.nbytes, np.uint8)
    source.read_rows(name + SCALE_SUFFIX, 0, entry.shape[0], raw)
    return scale_to_float32(torch.from_numpy(raw).view(source.dtype(name + SCALE_SUFFIX))).numpy().reshape(entry.shape)


def finite_scale(source: TensorSource, name: str) -> np.ndarray:
    """As read_scale; raises CheckpointError where one is NaN or infinite."""
    scale = read_scale(source, name)
    if not np.isfinite(scale).all():
        raise _not_finite(source.describe(name + SCALE_SUFFIX))
    return scale


def weight_block_size(config: ModelConfig) -> tuple[int, int]:
    """`weight_block_size` of config.json's quantization_config; 128x128, the released size, where it says nothing."""
    return config.quantization and config.quantization.block_size or _DEFAULT_BLOCK


def _decoding_tables(scale: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What each of the 256 codes stands for in each block: bits of `dtype`, [*scale.shape, 256].

    A block has thousands of weights, so the product and its one rounding are computed once per code, not per weight.
    """
    with np.errstate(over="ignore"):
        return _rounded(CODE_VALUES * np.ascontiguousarray(scale)[..., None], dtype)


def _converted(raw: np.ndarray, stored: str, dtype: torch.dtype, what: str) -> np.ndarray:
    """The bits in `dtype` of rows [n, bytes] stored as BF16, F16 or F32."""
    bits = raw.view(np.uint32 if stored == "F32" else np.uint16)
    _check_finite(bits, stored, what)
    if stored == to_safetensors(dtype):
        return bits
    if stored == "BF16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        values = bits.view(np.float16).astype(np.float32) if stored == "F16" else bits.view(np.float32)
    result = _rounded(values, dtype)
    if dtype != torch.float32:
        _check_fits(result, dtype, what)
    return result


def _rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The bits of float32 values rounded to `dtype`, ties to even. NaN is not kept in bfloat16."""
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    if dtype == torch.float32:
        return bits
    return ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)


def _check_finite(bits: np.ndarray, stored: str, what: str) -> None:
    if largest_magnitude(bits.reshape(-1)) > _LARGEST[stored]:
        raise _not_finite(what)


def _check_fits(bits: np.ndarray, dtype: torch.dtype, what: str) -> None:
    if largest_magnitude(bits.reshape(-1)) > _LARGEST[to_safetensors(dtype)]:
        raise CheckpointError(f"{what}: a value is larger than {dtype_name(dtype)} can hold; use float32")


def _not_finite(what: str) -> CheckpointError:
    return CheckpointError(f"{what}: holds NaN or infinity; the shard is damaged, download it again")
