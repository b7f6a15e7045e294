"""Compiled loops over weights. They release the interpreter lock, so threads run them side by side.

Numba compiles them on first use and keeps the result beside this file, or in the user's cache folder.
"""

import numba
import numpy as np

# The cache lines that a transposition has open at a time: as many rows of a wide matrix as the first-level cache holds.
_STRIP = 32


@numba.njit("boolean(uint8[::1])", nogil=True, cache=True)
def has_fp8_nan(codes: np.ndarray) -> bool:
    """Whether uint8 [n] holds the NaN of float8_e4m3fn, 0x7f or 0xff."""
    largest = np.uint8(0)
    for i in range(codes.shape[0]):
        largest = max(largest, np.uint8(codes[i] & np.uint8(0x7F)))
    return largest == 0x7F


@numba.njit(
    [f"void(uint8[:,:], {t}[:,:,::1], int64, int64, int64, int64, {t}[:,:])" for t in ("uint16", "uint32")],
    nogil=True,
    cache=True,
)
def decode_blocks(
    codes: np.ndarray, tables: np.ndarray, row: int, column: int, block_rows: int, block_columns: int, out: np.ndarray
) -> None:
    """out[i, j] = tables[its block][codes[i, j]] for a window [rows, columns] of a matrix that begins at (row, column).

    codes: uint8 [rows, columns]. tables: [blocks down, blocks across, 256], one entry per code, of out's dtype.
    Fast where a column of `out` lies together: a transposed result. For one in row order pass everything transposed.
    """
    rows, columns = codes.shape
    for i in range(row // block_rows, (row + rows - 1) // block_rows + 1):
        top, bottom = max(i * block_rows - row, 0), min((i + 1) * block_rows - row, rows)
        for j in range(column // block_columns, (column + columns - 1) // block_columns + 1):
            left, right = max(j * block_columns - column, 0), min((j + 1) * block_columns - column, columns)
            table = tables[i, j]
            for strip in range(top, bottom, _STRIP):
                source, target = codes[strip:bottom, left:right], out[strip:bottom, left:right]
                for x in range(source.shape[1]):
                    for y in range(min(source.shape[0], _STRIP)):
                        target[y, x] = table[source[y, x]]


@numba.njit([f"void({t}[:,:], {t}[:,:])" for t in ("uint16", "uint32")], nogil=True, cache=True)
def copy_strips(source: np.ndarray, out: np.ndarray) -> None:
    """out = source, both [rows, columns]; as decode_blocks, fast where a column of `out` lies together."""
    for strip in range(0, source.shape[0], _STRIP):
        from_, to = source[strip:], out[strip:]
        for x in range(source.shape[1]):
            for y in range(min(from_.shape[0], _STRIP)):
                to[y, x] = from_[y, x]
