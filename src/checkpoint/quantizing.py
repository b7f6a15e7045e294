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
from .numba_kernels import copy_strips, halve_codes, quantize_cells, transpose_bytes
from .units import Range

_STRIP = 1 << 16  # weights in float32 at a time
_EACH, _MEASURED = 16, 1 << 12  # halving is exact by design: of so many rows one is measured, if weights are many
_MAGNITUDES = np.arange(1 << 7)
_SQUARES = np.square(CODE_VALUES[_MAGNITUDES])
_LOST = np.where((_MAGNITUDES < 16) & (_MAGNITUDES % 2 == 1), 2.0**-18, 0).astype(np.float32)  # 2**-9, squared


def cell_size(rows: Range, columns: Range, scale: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the source that share a scale of [cells along columns, cells along rows]."""
    return (rows[1] - rows[0]) // scale.shape[1], (columns[1] - columns[0]) // scale.shape[0]


def lies_within(extent: Range, size: int, block: int) -> bool:
    """Whether each of the cells of `size` that divide the extent lies in one block."""
    return all(start // block == (start + size - 1) // block for start in range(*extent, size))


def scale_of_cells(
    scale: np.ndarray, rows: Range, columns: Range, size: tuple[int, int], block: tuple[int, int]
) -> np.ndarray:
    """The checkpoint's own scale of each cell, [cells along rows, cells along columns]."""
    return scale[np.arange(*rows, size[0]) // block[0]][:, np.arange(*columns, size[1]) // block[1]]


def halve(codes: np.ndarray, own: np.ndarray, out: np.ndarray, scale: np.ndarray, what: str) -> np.ndarray:
    """Codes [rows, columns] of the checkpoint and their scales to those of half and double the size. Returns
    [sum of squares, sum of squares of the error], both from a part of the rows."""
    codes, doubled = np.ascontiguousarray(codes), 2 * own.T
    _check_scale(doubled, what)
    scale[...] = doubled
    halved = np.empty_like(codes)
    halve_codes(codes.reshape(-1), halved.reshape(-1))
    _transpose(halved, out)
    return _measured(codes, own)


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
        quantize_cells(values((start, stop)), *size, rounded[first : stop - rows[0]], own, sums)
    _check_scale(scales, what)
    scale[...] = scales.T
    _transpose(rounded, codes)
    return sums


def strip_rows(columns: Range) -> int:
    """How many rows to take at a time, so that they stay in the processor's cache in float32."""
    return max(1, _STRIP // max(1, columns[1] - columns[0]))


def _measured(codes: np.ndarray, own: np.ndarray) -> np.ndarray:
    """[sum of squares, sum of squares of what halving loses] of codes [rows, columns], by some of the rows if many."""
    step = min(_EACH, max(1, codes.size // _MEASURED), len(codes))
    taken = np.arange(0, len(codes), step)
    magnitudes, scales = codes[::step] & 0x7F, own[taken // (len(codes) // len(own))].astype(np.float64)
    by_cell = (table[magnitudes].reshape(*scales.shape, -1).sum(-1) for table in (_SQUARES, _LOST))
    return np.array([(sums * scales**2).sum() for sums in by_cell]) * (len(codes) / len(taken))


def _transpose(source: np.ndarray, out: np.ndarray) -> None:
    """Bytes [rows, columns] to [columns, rows]; eight by eight at a time where sizes and addresses allow."""
    if all(n % 8 == 0 for n in (*source.shape, *out.strides[:1], out.ctypes.data)):
        transpose_bytes(source.view(np.uint64), out.view(np.uint64))
    else:
        copy_strips(source, out.T)


def _check_scale(scale: np.ndarray, what: str) -> None:
    if not np.isfinite(scale).all():
        raise CheckpointError(f"{what}: its weights are too large for FP8 with float32 scales; download it again")
