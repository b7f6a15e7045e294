"""From weights to FP8 codes of which 240 is the largest, with a scale for each cell (weight_forms.py).

Where all weights of a cell have one scale in the checkpoint, its codes are halved and the scale is doubled: exact but
for sixteen codes, the odd ones among the smallest, which round to even. Elsewhere weights are rounded anew in float32,
the largest of a cell to 240. Nothing is ever cut off.

Rows and columns are those of the source [output, input]; codes and scales lie transposed, [input, output].
"""

from collections.abc import Callable

import numpy as np

from ..errors import CheckpointError
from .fp8 import CODE_VALUES
from .numba_kernels import add_by_code, quantize_cells
from .units import Range

_STRIP = 1 << 16  # weights in float32 at a time
_EACH, _MEASURED = 64, 1 << 12  # halving is exact by design: of so many rows one is measured, if weights are many
_LOSSY = (np.arange(256) % 128 < 16) & (np.arange(256) % 2 == 1)  # each is off by 2**-9
_SQUARES_AND_LOST = np.array([CODE_VALUES**2, np.where(_LOSSY, 2.0**-18, 0)], np.float32)


def cell_size(rows: Range, columns: Range, scale: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the source that share a scale of [cells along columns, cells along rows]."""
    return (rows[1] - rows[0]) // scale.shape[1], (columns[1] - columns[0]) // scale.shape[0]


def lies_within(extent: Range, size: int, block: int) -> bool:
    """Whether each of the cells of `size` that divide the extent lies in one block."""
    if block % size == 0 and extent[0] % size == 0:
        return True
    starts = np.arange(*extent, size)
    return bool((starts // block == (starts + size - 1) // block).all())


def measure(codes: np.ndarray, scale: np.ndarray, row: int, column: int, block: tuple[int, int]) -> np.ndarray:
    """[sum of squares, sum of squares of what halving loses] of a window of the checkpoint's codes, by some of its rows
    if they are many."""
    step, sums = min(_EACH, max(1, codes.size // _MEASURED), len(codes)), np.zeros(2)
    add_by_code(codes, scale, row, column, *block, step, _SQUARES_AND_LOST, sums)
    return sums * (len(codes) / len(range(0, len(codes), step)))


def quantize_strips(
    rows: Range,
    columns: Range,
    values: Callable[[Range], np.ndarray],
    codes: np.ndarray,
    scale: np.ndarray,
    what: str,
) -> np.ndarray:
    """Rounds weights anew. values(rows): their float32. Returns [sum of squares, sum of squares of the error]."""
    size, sums = cell_size(rows, columns, scale), np.zeros(2)
    step = -(-strip_rows(columns) // size[0]) * size[0]
    rounded = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.uint8)
    scales = np.empty(scale.T.shape, np.float32)
    for start in range(*rows, step):
        stop, first = min(start + step, rows[1]), start - rows[0]
        own = scales[first // size[0] : (stop - rows[0]) // size[0]]
        weights = np.ascontiguousarray(values((start, stop)))  # of float32 sources a part of what lies there
        quantize_cells(weights, *size, rounded[first : stop - rows[0]], own, sums)
    check_scale(scales, what)
    scale[...] = scales.T
    transpose(rounded, codes)
    return sums


def strip_rows(columns: Range) -> int:
    """How many rows to take at a time, so that they stay in the processor's cache in float32."""
    return max(1, _STRIP // max(1, columns[1] - columns[0]))


def transpose(source: np.ndarray, out: np.ndarray, halve: bool = False) -> None:
    """Codes [rows, columns] to [columns, rows], or to those of half the values."""
    from .byte_squares import transpose_codes  # with numba, only where there is work

    transpose_codes(source, out, halve)


def check_scale(scale: np.ndarray, what: str) -> None:
    """Raises CheckpointError where a scale has become infinite."""
    if not np.isfinite(scale).all():
        raise CheckpointError(f"{what}: its weights are too large for FP8 with float32 scales; download it again")
