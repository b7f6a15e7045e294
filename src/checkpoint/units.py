"""Divides the work of sharding into units that fit in memory, and says which rectangle of which source goes where.

All positions are in a tensor's grid [experts, rows, columns], see layout.Grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from .layout import Grid, Source, TensorSpec

# Most elements in a unit of a tensor that is cut by rows. Experts are not cut, since they are transposed.
_UNIT_ELEMENTS = 1 << 23

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a source, and where it goes in a rank's region (rows and columns of the region)."""

    block: int
    source: tuple[Range, Range]
    target: tuple[Range, Range]


@dataclass(frozen=True)
class Region:
    """The rows of a rank's tensor that one unit produces; contiguous in the rank's file. Zero where no piece lies."""

    start: int
    stop: int
    columns: int
    pieces: tuple[Piece, ...]

    @property
    def is_padded(self) -> bool:
        covered = sum(prod(stop - start for start, stop in piece.target) for piece in self.pieces)
        return covered < (self.stop - self.start) * self.columns


@dataclass(frozen=True)
class Unit:
    """Rows start..stop of one expert of a tensor."""

    spec: TensorSpec
    expert: int
    start: int
    stop: int

    def sources(self) -> Sequence[Source]:
        count = len(self.spec.grid.blocks)
        return self.spec.sources[self.expert * count : (self.expert + 1) * count]

    def region(self, rank: int, tp_degree: int) -> Region | None:
        """What `rank` gets of this unit; None when that is nothing."""
        return _region(self.spec.grid, self.start, self.stop, rank, tp_degree)


def plan_units(specs: Sequence[TensorSpec]) -> Iterator[Unit]:
    for spec in specs:
        grid = spec.grid
        step = grid.rows
        if grid.experts == 1 and grid.stride == 1:
            step = max(1, _UNIT_ELEMENTS // grid.columns)
        for expert in range(grid.experts):
            for start in range(0, grid.rows, step):
                yield Unit(spec, expert, start, min(start + step, grid.rows))


def read_ranges(regions: Sequence[Region], block: int) -> list[Range]:
    """The rows of a source that the regions need, as few ranges as possible."""
    needed = sorted(piece.source[0] for region in regions for piece in region.pieces if piece.block == block)
    merged: list[Range] = []
    for start, stop in needed:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def read_columns(regions: Sequence[Region], block: int) -> Range:
    """The columns of a source that the regions need, as one range."""
    needed = [piece.source[1] for region in regions for piece in region.pieces if piece.block == block]
    return min((start for start, _ in needed), default=0), max((stop for _, stop in needed), default=0)


@lru_cache(maxsize=1 << 15)
def _region(grid: Grid, start: int, stop: int, rank: int, tp_degree: int) -> Region | None:
    row_parts = _parts(grid, 1, (start, stop), rank, tp_degree)
    column_parts = _parts(grid, 2, (0, grid.columns), rank, tp_degree)
    if not row_parts:
        return None
    first = row_parts[0][1]
    pieces = []
    for i, block in enumerate(grid.blocks):
        size = (block.columns, block.rows) if block.transposed else (block.rows, block.columns)
        for rows, row_shift in row_parts:
            for columns, column_shift in column_parts:
                rows_in = _overlap(rows, (block.row, block.row + size[0]))
                columns_in = _overlap(columns, (block.column, block.column + size[1]))
                if rows_in and columns_in:
                    source = (_moved(rows_in, -block.row), _moved(columns_in, -block.column))
                    target = (
                        _moved(rows_in, row_shift - rows[0] - first),
                        _moved(columns_in, column_shift - columns[0]),
                    )
                    pieces.append(Piece(i, source[::-1] if block.transposed else source, target))
    height = sum(rows[1] - rows[0] for rows, _ in row_parts)
    width = sum(columns[1] - columns[0] for columns, _ in column_parts)
    return Region(first, first + height, width, tuple(pieces))


def _parts(grid: Grid, axis: int, window: Range, rank: int, tp_degree: int) -> list[tuple[Range, int]]:
    """The parts of `window` that the rank holds along `axis`, each with its position in the rank's tensor."""
    if grid.axis != axis:
        return [(window, window[0])]
    parts, position = [], 0
    for start, stop in grid.rank_ranges(rank, tp_degree):
        overlap = _overlap((start, stop), window)
        if overlap:
            parts.append((overlap, position + overlap[0] - start))
        position += stop - start
    return parts


def _overlap(a: Range, b: Range) -> Range | None:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def _moved(range_: Range, by: int) -> Range:
    return range_[0] + by, range_[1] + by
