"""How weights are stored, and how what was read of one becomes bits of the model's dtype.

The one place that knows: `encoded_rows` chooses by the stored dtype. Another way of storing weights is another branch
there and another class with a `paste`.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import numpy as np
import torch

from ..dtypes import dtype_name, to_safetensors
from ..errors import CheckpointError
from .fp8 import CODE_VALUES, FP8_DTYPE, FP8_MAX, scale_to_float32
from .numba_kernels import copy_strips, decode_blocks, decode_values, largest_magnitude, spread_scale
from .quantizing import (
    cell_size,
    check_scale,
    lies_within,
    measure,
    quantize_strips,
    strip_rows,
    transpose,
)
from .source import TensorSource
from .stored import StoredWeight
from .units import Range

# The integers that hold the bits of what comes out.
BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16, FP8_DTYPE: np.uint8}
_FP8 = "F8_E4M3"
# The bits of the largest number of each format; infinity and NaN lie above.
_LARGEST = {_FP8: 0x7E, "BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}
_CHUNK = 1 << 15  # elements
_TABLE_PAYS = 1 << 10  # weights of a block, from which on a table of what its 256 codes stand for is worth making
_NIBBLE_VALUES = torch.arange(-8, 8, dtype=torch.float32).to(FP8_DTYPE).view(torch.uint8).numpy().astype(np.uint16)
# For each byte the codes of its lower and upper four bits.
_CODES_OF_NIBBLES = (_NIBBLE_VALUES[:, None] << 8 | _NIBBLE_VALUES).reshape(-1)


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

    def quantize(self, rows: Range, columns: Range, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Makes FP8 codes and scales of a rectangle of a source that lies transposed in its tensor.

        codes: uint8 [columns, rows]; scale: float32 [cells along columns, cells along rows]. Returns float64 [2]: the
        sum of squares of the weights, and of the error (see quantizing.py).
        """


def encoded_rows(
    source: TensorSource, stored: StoredWeight, read: Window, dtype: torch.dtype, transposed: bool
) -> EncodedRows:
    """What was read of a weight, to be decoded to `dtype`; `read` holds uint8 [rows, bytes].

    Raises CheckpointError naming the tensor when it holds NaN or infinity, or will in `dtype`.
    """
    what, found = source.describe(stored.name), source.entries[stored.name].dtype
    if stored.scale is None:
        return _PlainRows(read, found, dtype, transposed, what)
    scale = finite_scale(source, stored.scale)
    scale = scale if scale.ndim == 2 else scale.reshape(-1, 1)
    if stored.packed > 1:
        read = Window([(start, _unpacked(raw)) for start, raw in read.parts], read.left)
    else:
        for _, codes in read.parts:
            _check_finite(codes, _FP8, what)
    return _CodedRows(read, scale, stored.block, dtype, transposed, what)


class _CodedRows:
    """A matrix of FP8 codes with a scale for each block. INT4 has become such codes, see _unpacked."""

    def __init__(
        self,
        read: Window,
        scale: np.ndarray,
        block_size: tuple[int, int],
        dtype: torch.dtype,
        transposed: bool,
        what: str,
    ):
        self._read, self._scale, self._block_size, self._transposed = read, scale, block_size, transposed
        self._dtype, self._what = dtype, what
        self._may_overflow = np.abs(scale).max(initial=0) > torch.finfo(dtype).max / FP8_MAX

    @cached_property
    def _tables(self) -> np.ndarray:
        return _decoding_tables(self._scale if self._transposed else self._scale.T, self._dtype)

    @cached_property
    def _measured(self) -> np.ndarray:
        """What `quantize` returns where codes are halved, for each weight."""
        sums, count = np.zeros(2), 0
        for start, codes in self._read.parts:
            sums += measure(codes, self._scale, start, self._read.left, self._block_size)
            count += codes.size
        return sums / max(count, 1)

    @cached_property
    def _doubled_scale(self) -> np.ndarray:
        with np.errstate(over="ignore"):
            doubled = 2 * self._scale
        check_scale(doubled, self._what)
        return doubled

    def paste(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        if prod(self._block_size) < _TABLE_PAYS:
            self._paste_values(rows, columns, out.T if self._transposed else out)
        else:
            codes = self._read.rectangle(rows, columns)
            if self._transposed:
                decode_blocks(codes, self._tables, rows[0], columns[0], *self._block_size, out.T)
            else:
                decode_blocks(codes.T, self._tables, columns[0], rows[0], *reversed(self._block_size), out.T)
        if self._may_overflow:
            _check_fits(out, self._dtype, self._what)

    def quantize(self, rows: Range, columns: Range, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        size = cell_size(rows, columns, scale)
        within = (lies_within(*pair) for pair in zip((rows, columns), size, self._block_size, strict=True))
        if all(within):
            return self._keep(rows, columns, size, codes, scale)
        return quantize_strips(rows, columns, lambda part: self._values(part, columns), codes, scale, self._what)

    def _keep(
        self, rows: Range, columns: Range, size: tuple[int, int], codes: np.ndarray, scale: np.ndarray
    ) -> np.ndarray:
        """Halved codes and double scales."""
        own = self._read.rectangle(rows, columns)
        transpose(own, codes, halve=True)
        spread_scale(self._doubled_scale, rows[0], columns[0], *size, *self._block_size, scale)
        return self._measured * own.size

    def _values(self, rows: Range, columns: Range) -> np.ndarray:
        """The weights, float32 [rows, columns]."""
        codes = self._read.rectangle(rows, columns)
        values = np.empty(codes.shape, np.float32)
        decode_values(codes, self._scale, rows[0], columns[0], *self._block_size, values)
        return values

    def _paste_values(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        """out: [rows, columns]."""
        step = strip_rows(columns)
        for start in range(*rows, step):
            part = start, min(start + step, rows[1])
            chunk = rounded(self._values(part, columns), self._dtype)
            copy_strips(chunk, out[start - rows[0] : part[1] - rows[0]])


class _PlainRows:
    """A BF16, F16 or F32 tensor."""

    def __init__(self, read: Window, stored: str, dtype: torch.dtype, transposed: bool, what: str):
        bits = [(start, raw.view(np.uint32 if stored == "F32" else np.uint16)) for start, raw in read.parts]
        for _, values in bits:
            _check_finite(values, stored, what)
        self._read, self._transposed = Window(bits, read.left), transposed
        self._stored, self._dtype, self._what = stored, dtype, what

    def quantize(self, rows: Range, columns: Range, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        def values(part: Range) -> np.ndarray:
            bits = self._read.rectangle(part, columns)
            return _converted(bits, self._stored, torch.float32, self._what).view(np.float32)

        return quantize_strips(rows, columns, values, codes, scale, self._what)

    def paste(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        bits, out = self._read.rectangle(rows, columns), out.T if self._transposed else out
        # Conversion makes copies, which stay in the processor's cache if they are small.
        step = len(bits) if self._stored == to_safetensors(self._dtype) else max(1, _CHUNK // max(bits.shape[1], 1))
        for i in range(0, len(bits), step):
            chunk = _converted(bits[i : i + step], self._stored, self._dtype, self._what)
            if self._transposed:
                copy_strips(chunk, out[i : i + step])
            else:
                out[i : i + step] = chunk


def finite_scale(source: TensorSource, name: str) -> np.ndarray:
    """A scale as float32, of the shape that is stored. Raises CheckpointError where one is NaN or infinite."""
    entry = source.entries[name]
    raw = np.empty(entry.nbytes, np.uint8)
    source.read_rows(name, 0, entry.shape[0] if entry.shape else 1, raw)
    scale = scale_to_float32(torch.from_numpy(raw).view(source.dtype(name))).numpy().reshape(entry.shape)
    if not np.isfinite(scale).all():
        raise _not_finite(source.describe(name))
    return scale


def _unpacked(raw: np.ndarray) -> np.ndarray:
    """The FP8 codes uint8 [rows, weights] of packed INT4 [rows, bytes]: FP8 holds -8 to 7 exactly."""
    return _CODES_OF_NIBBLES[raw].view(np.uint8).reshape(len(raw), -1)


def _decoding_tables(scale: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What each of the 256 codes stands for in each block: bits of `dtype`, [*scale.shape, 256].

    A block has thousands of weights, so the product and its one rounding are computed once per code, not per weight.
    """
    with np.errstate(over="ignore"):
        return rounded(CODE_VALUES * np.ascontiguousarray(scale)[..., None], dtype)


def _converted(bits: np.ndarray, stored: str, dtype: torch.dtype, what: str) -> np.ndarray:
    """The bits in `dtype` of those of BF16, F16 or F32."""
    if stored == to_safetensors(dtype):
        return bits
    if stored == "BF16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        values = bits.view(np.float16).astype(np.float32) if stored == "F16" else bits.view(np.float32)
    result = rounded(values, dtype)
    if dtype != torch.float32:
        _check_fits(result, dtype, what)
    return result


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
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
