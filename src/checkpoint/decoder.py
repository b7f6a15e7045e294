"""Makes the regions of a unit of work: reads the rows of the sources that are needed, decodes, transposes, joins."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ..model_config import ModelConfig
from .encodings import BITS, EncodedRows, Window, encoded_rows
from .layout import Source, TensorSpec
from .source import TensorSource
from .stored import stored_weight
from .units import Region, Unit, read_columns, read_ranges

_ALIGNMENT = 64
_PAGE = 4096  # bytes; what a disk reads at least
# All threads together; fewer run where a unit needs more than its share.
_WORKING_MEMORY = 1 << 30


@dataclass(frozen=True)
class Decoded:
    """What `ranks` get of a unit. bits [rows, columns]: uint32 for float32, uint16 for bfloat16, uint8 for FP8 codes.
    scale: float32 [rows, columns] of FP8 codes, else None. sums: of squares of the weights and of the error of the
    codes, float64 [2], None likewise."""

    ranks: Sequence[int]
    region: Region
    bits: np.ndarray
    scale: np.ndarray | None
    sums: np.ndarray | None


class UnitDecoder:
    """Shared by threads; each has its own buffers, which grow to what the largest unit needs and are used again."""

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        dtype: torch.dtype,
        tp_degree: int = 1,
        ranks: Sequence[int] = (0,),
    ):
        self._source, self._config, self._dtype = source, config, dtype
        self._tp_degree, self._ranks = tp_degree, ranks
        self._buffers = threading.local()

    def regions(self, unit: Unit) -> Iterator[Decoded]:
        """What the ranks get of the unit, those together that get the same; valid until the next is made. Raises
        CheckpointError naming a tensor that holds NaN or infinity or cannot be read."""
        groups = self._groups(unit)
        sources = self._load_all(unit, [region for _, region in groups])
        for ranks, region in groups:
            shape, scale = (region.stop - region.start, region.columns), None
            bits = self._array("region", shape, BITS[unit.spec.dtype(self._dtype)])
            if unit.spec.scale:
                scale = self._array("scale", unit.spec.scale.rank_shape(self._tp_degree)[1:], np.float32)
            yield Decoded(ranks, region, bits, scale, _make(region, sources, bits, scale))

    def decode_region(self, unit: Unit, region: Region, out: np.ndarray, scale: np.ndarray | None = None) -> None:
        """The same for one region of a unit, into `out` [rows, columns], and its scale."""
        _make(region, self._load_all(unit, [region]), out, scale)

    def affordable_jobs(self, units: Sequence[Unit]) -> int:
        """How many of the units can be in work at a time within the memory set aside for that."""
        largest = {(unit.spec.grid, unit.spec.sources[0].name): unit for unit in units}
        return max(1, _WORKING_MEMORY // max(map(self._memory, largest.values())))

    def _memory(self, unit: Unit) -> int:
        """Bytes that a thread needs for a unit: its sources as stored, and one region."""
        grid, size = unit.spec.grid, 0
        rows = unit.stop - unit.start
        for source, block in zip(unit.sources(), grid.blocks, strict=True):
            read_rows = block.rows if block.transposed else min(rows, block.rows)
            stored = stored_weight(self._source, source.name, source.shape, self._config)
            size += read_rows * self._source.entries[stored.name].row_bytes
            # Codes of what is packed; two copies of the codes while they are made, see quantizing.py.
            size += read_rows * block.columns * ((stored.packed > 1) + (2 if unit.spec.scale else 0))
        _, rank_rows, rank_columns = grid.rank_shape(self._tp_degree)
        return size + min(rows, rank_rows) * rank_columns * unit.spec.dtype(self._dtype).itemsize

    def _groups(self, unit: Unit) -> list[tuple[Sequence[int], Region]]:
        if unit.spec.grid.axis is None:
            return [(self._ranks, unit.region(self._ranks[0], self._tp_degree))]
        regions = (([rank], unit.region(rank, self._tp_degree)) for rank in self._ranks)
        return [(ranks, region) for ranks, region in regions if region]

    def _load_all(self, unit: Unit, regions: Sequence[Region]) -> list[EncodedRows]:
        blocks = zip(unit.sources(), unit.spec.grid.blocks, strict=True)
        return [self._load(unit.spec, source, block.transposed, regions, i) for i, (source, block) in enumerate(blocks)]

    def _load(
        self, spec: TensorSpec, source: Source, transposed: bool, regions: Sequence[Region], slot: int
    ) -> EncodedRows:
        stored = stored_weight(self._source, source.name, source.shape, self._config)
        entry = self._source.entries[stored.name]
        ranges, (left, right) = read_ranges(regions, slot), read_columns(regions, slot)
        columns = left // stored.packed, -(-right // stored.packed)
        if (entry.columns - (columns[1] - columns[0])) * entry.item_bytes < _PAGE:
            columns = 0, entry.columns  # the disk would read the rest along
        size = max((columns[1] - columns[0]) * entry.item_bytes * sum(stop - start for start, stop in ranges), 1)
        buffer, parts, offset = self._buffer(slot, size), [], 0
        for start, stop in ranges:
            raw = self._source.read_rows(stored.name, start, stop, buffer[offset:], columns)
            parts.append((start, raw))
            offset += raw.size
        read, dtype = Window(parts, columns[0] * stored.packed), spec.dtype(self._dtype)
        return encoded_rows(self._source, stored, read, torch.float32 if spec.scale else dtype, transposed)

    def _array(self, slot: str, shape: tuple[int, ...], dtype: type[np.number]) -> np.ndarray:
        return self._buffer(slot, prod(shape) * dtype().itemsize).view(dtype).reshape(shape)

    def _buffer(self, slot: int | str, size: int) -> np.ndarray:
        buffer = getattr(self._buffers, str(slot), None)
        if buffer is None or len(buffer) < size:
            memory = np.empty(size + _ALIGNMENT, np.uint8)
            buffer = memory[-memory.ctypes.data % _ALIGNMENT :][:size]
            setattr(self._buffers, str(slot), buffer)
        return buffer[:size]


def _make(
    region: Region, sources: Sequence[EncodedRows], out: np.ndarray, scale: np.ndarray | None
) -> np.ndarray | None:
    """Fills `out`, and `scale` if there is one: then it returns the sums of EncodedRows.quantize."""
    if scale is None:
        if region.is_padded:
            out[...] = 0
        for piece in region.pieces:
            (top, bottom), (left, right) = piece.target
            sources[piece.block].paste(*piece.source, out[top:bottom, left:right])
        return None
    sums, (rows, columns) = np.zeros(2), (out.shape[axis] // scale.shape[axis] for axis in (0, 1))
    for piece in region.pieces:
        (top, bottom), (left, right) = piece.target
        own = scale[top // rows : bottom // rows, left // columns : right // columns]
        sums += sources[piece.block].quantize(*piece.source, out[top:bottom, left:right], own)
    return sums
