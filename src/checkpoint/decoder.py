"""Makes the regions of a unit of work: reads the rows of the sources that are needed, decodes, transposes, joins."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..errors import CheckpointError
from .checks import read_scale
from .fp8 import check_codes, decoding_tables, float_bits
from .kernels import copy_strips, decode_blocks
from .reader import CheckpointReader
from .units import Range, Region, Unit, read_columns, read_ranges

BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16}
_ALIGNMENT = 64
_PAGE = 4096  # bytes; what a disk reads at least


class UnitDecoder:
    """Shared by threads; each has its own buffers, which grow to what the largest unit needs and are used again."""

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype,
        block_size: tuple[int, int],
        tp_degree: int,
        ranks: Sequence[int],
    ):
        self._reader, self._dtype, self._block_size = reader, dtype, block_size
        self._tp_degree, self._ranks = tp_degree, ranks
        self._buffers = threading.local()

    def regions(self, unit: Unit) -> Iterator[tuple[Sequence[int], Region, np.ndarray]]:
        """(ranks, their region, its bits [rows, columns]) for all ranks that get something of the unit.

        Bits are uint32 for float32, uint16 for bfloat16, and valid until the next region is made. Ranks that hold the
        same come together. Raises CheckpointError naming a tensor that holds NaN or cannot be read.
        """
        groups = self._groups(unit)
        dtype = unit.spec.dtype(self._dtype)
        sources = [
            self._load(source.name, block.transposed, [region for _, region in groups], dtype, i)
            for i, (source, block) in enumerate(zip(unit.sources(), unit.spec.grid.blocks, strict=True))
        ]
        for ranks, region in groups:
            shape = (region.stop - region.start, region.columns)
            bits = self._buffer("region", shape[0] * shape[1] * BITS[dtype]().itemsize).view(BITS[dtype]).reshape(shape)
            for piece in region.pieces:
                (top, bottom), (left, right) = piece.target
                sources[piece.block].paste(*piece.source, bits[top:bottom, left:right])
            yield ranks, region, bits

    def _groups(self, unit: Unit) -> list[tuple[Sequence[int], Region]]:
        if unit.spec.grid.axis is None:
            return [(self._ranks, unit.region(self._ranks[0], self._tp_degree))]
        regions = (([rank], unit.region(rank, self._tp_degree)) for rank in self._ranks)
        return [(ranks, region) for ranks, region in regions if region]

    def _load(
        self, name: str, transposed: bool, regions: Sequence[Region], dtype: torch.dtype, slot: int
    ) -> "_Fp8Rows | _PlainRows":
        entry = self._reader.entries[name]
        ranges, columns = read_ranges(regions, slot), read_columns(regions, slot)
        if (entry.columns - (columns[1] - columns[0])) * entry.item_bytes < _PAGE:
            columns = 0, entry.columns  # the disk would read the rest along
        size = max((columns[1] - columns[0]) * entry.item_bytes * sum(stop - start for start, stop in ranges), 1)
        buffer, parts, offset = self._buffer(slot, size), [], 0
        for start, stop in ranges:
            raw = self._reader.read_rows(name, start, stop, buffer[offset:], columns)
            parts.append((start, raw))
            offset += raw.size
        what = self._reader.describe(name)
        if entry.dtype == "F8_E4M3":
            check_codes(buffer[:offset], what)
            scale = read_scale(self._reader, name)
            return _Fp8Rows(parts, columns[0], scale, self._block_size, transposed, dtype)
        parts = [(start, plain_bits(raw, entry.dtype, dtype, what)) for start, raw in parts]
        return _PlainRows(parts, columns[0], transposed)

    def _buffer(self, slot: int | str, size: int) -> np.ndarray:
        buffer = getattr(self._buffers, str(slot), None)
        if buffer is None or len(buffer) < size:
            memory = np.empty(size + _ALIGNMENT, np.uint8)
            buffer = memory[-memory.ctypes.data % _ALIGNMENT :][:size]
            setattr(self._buffers, str(slot), buffer)
        return buffer[:size]


class _Fp8Rows:
    """Ranges of rows of an FP8 matrix, from column `left` on: (first row, codes uint8 [rows, columns])."""

    def __init__(
        self,
        parts: list[tuple[int, np.ndarray]],
        left: int,
        scale: np.ndarray,
        block_size: tuple[int, int],
        transposed: bool,
        dtype: torch.dtype,
    ):
        self._parts, self._left, self._block_size, self._transposed = parts, left, block_size, transposed
        self._tables = decoding_tables(scale if transposed else scale.T, dtype)

    def paste(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        """Decodes a rectangle into `out`, the bits of its place in the tensor."""
        codes = _rectangle(self._parts, self._left, rows, columns)
        if self._transposed:
            decode_blocks(codes, self._tables, rows[0], columns[0], *self._block_size, out.T)
        else:
            decode_blocks(codes.T, self._tables, columns[0], rows[0], *reversed(self._block_size), out.T)


class _PlainRows:
    """The same of a matrix that is no FP8: (first row, bits of the result's dtype [rows, columns])."""

    def __init__(self, parts: list[tuple[int, np.ndarray]], left: int, transposed: bool):
        self._parts, self._left, self._transposed = parts, left, transposed

    def paste(self, rows: Range, columns: Range, out: np.ndarray) -> None:
        bits = _rectangle(self._parts, self._left, rows, columns)
        if self._transposed:
            copy_strips(bits, out.T)
        else:
            out[...] = bits


def _rectangle(parts: list[tuple[int, np.ndarray]], left: int, rows: Range, columns: Range) -> np.ndarray:
    first, values = next(part for part in reversed(parts) if part[0] <= rows[0])
    return values[rows[0] - first : rows[1] - first, columns[0] - left : columns[1] - left]


def plain_bits(raw: np.ndarray, stored: str, dtype: torch.dtype, what: str) -> np.ndarray:
    """The bits in `dtype` of rows [n, bytes] stored as BF16, F16 or F32; raises CheckpointError when one is NaN."""
    if stored == "BF16":
        bits = raw.view(np.uint16)
        has_nan = ((bits & 0x7FFF) > 0x7F80).any()
        result = bits if dtype == torch.bfloat16 else bits.astype(np.uint32) << 16
    else:
        values = raw.view(np.float32) if stored == "F32" else raw.view(np.float16).astype(np.float32)
        has_nan = np.isnan(values).any()
        result = float_bits(values, dtype)
    if has_nan:
        raise CheckpointError(f"{what}: holds NaN; the shard is damaged, download it again")
    return result
