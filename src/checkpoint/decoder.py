"""Makes the regions of a unit of work: reads the rows of the sources that are needed, decodes, transposes, joins."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..model_config import ModelConfig
from .encodings import BITS, EncodedRows, Window, encoded_rows, working_bytes
from .source import TensorSource
from .units import Region, Unit, read_columns, read_ranges

_ALIGNMENT = 64
_PAGE = 4096  # bytes; what a disk reads at least
# All threads together; fewer run where a unit needs more than its share.
_WORKING_MEMORY = 1 << 30


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

    def regions(self, unit: Unit) -> Iterator[tuple[Sequence[int], Region, np.ndarray]]:
        """(ranks, their region, its bits [rows, columns]) for all ranks that get something of the unit.

        Bits are uint32 for float32, uint16 for bfloat16, and valid until the next region is made. Ranks that hold the
        same come together. Raises CheckpointError naming a tensor that holds NaN or infinity or cannot be read.
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

    def affordable_jobs(self, units: Sequence[Unit]) -> int:
        """How many of the units can be in work at a time within the memory set aside for that."""
        largest = {(unit.spec.grid, unit.spec.sources[0].name): unit for unit in units}
        return max(1, _WORKING_MEMORY // max(map(self._memory, largest.values())))

    def _memory(self, unit: Unit) -> int:
        """Bytes that a thread needs for a unit: its sources as stored and converted, and one region."""
        grid, size = unit.spec.grid, 0
        rows = unit.stop - unit.start
        for source, block in zip(unit.sources(), grid.blocks, strict=True):
            read_rows = block.rows if block.transposed else min(rows, block.rows)
            size += read_rows * working_bytes(self._source.entries[source.name])
        _, rank_rows, rank_columns = grid.rank_shape(self._tp_degree)
        return size + min(rows, rank_rows) * rank_columns * unit.spec.dtype(self._dtype).itemsize

    def _groups(self, unit: Unit) -> list[tuple[Sequence[int], Region]]:
        if unit.spec.grid.axis is None:
            return [(self._ranks, unit.region(self._ranks[0], self._tp_degree))]
        regions = (([rank], unit.region(rank, self._tp_degree)) for rank in self._ranks)
        return [(ranks, region) for ranks, region in regions if region]

    def _load(
        self, name: str, transposed: bool, regions: Sequence[Region], dtype: torch.dtype, slot: int
    ) -> EncodedRows:
        entry = self._source.entries[name]
        ranges, columns = read_ranges(regions, slot), read_columns(regions, slot)
        if (entry.columns - (columns[1] - columns[0])) * entry.item_bytes < _PAGE:
            columns = 0, entry.columns  # the disk would read the rest along
        size = max((columns[1] - columns[0]) * entry.item_bytes * sum(stop - start for start, stop in ranges), 1)
        buffer, parts, offset = self._buffer(slot, size), [], 0
        for start, stop in ranges:
            raw = self._source.read_rows(name, start, stop, buffer[offset:], columns)
            parts.append((start, raw))
            offset += raw.size
        return encoded_rows(self._source, name, Window(parts, columns[0]), self._config, dtype, transposed)

    def _buffer(self, slot: int | str, size: int) -> np.ndarray:
        buffer = getattr(self._buffers, str(slot), None)
        if buffer is None or len(buffer) < size:
            memory = np.empty(size + _ALIGNMENT, np.uint8)
            buffer = memory[-memory.ctypes.data % _ALIGNMENT :][:size]
            setattr(self._buffers, str(slot), buffer)
        return buffer[:size]
