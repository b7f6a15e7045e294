"""Compiled loops over weights. They release the interpreter lock, so threads run them side by side.

Numba is imported and compiles a loop when it is first called. It keeps the result beside this file or in the user's
cache folder; where neither can be written, each process compiles anew.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

# The cache lines that a transposition has open at a time: as many rows of a wide matrix as the first-level cache holds.
_STRIP = 32
_LOCK = threading.Lock()


def compiled(*signatures: str, **options: Any) -> Callable[[Callable], Callable]:
    def decorate(function: Callable) -> Callable:
        compiled = None

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                with _LOCK:
                    compiled = compiled or _compile(function, list(signatures), options)
            return compiled(*args)

        return call

    return decorate


def _compile(function: Callable, signatures: list[str], options: dict[str, Any]) -> Callable:
    import numba

    try:
        return numba.njit(signatures, nogil=True, cache=True, **options)(function)
    except Exception:  # what is wrong with the cache; what is wrong with the function comes again
        return numba.njit(signatures, nogil=True, **options)(function)


@compiled("uint8(uint8[::1])", "uint16(uint16[::1])", "uint32(uint32[::1])")
def largest_magnitude(bits: np.ndarray) -> int:
    """The largest of the bits of floats [n] without their signs: in all float formats the order of the magnitudes,
    infinity and NaN above all numbers."""
    one = bits.dtype.type(1)
    mask = bits.dtype.type((one << (8 * bits.itemsize - 1)) - one)
    largest = bits.dtype.type(0)
    for i in range(bits.shape[0]):
        largest = max(largest, bits.dtype.type(bits[i] & mask))
    return largest


@compiled(*(f"void(uint8[:,:], {t}[:,:,::1], int64, int64, int64, int64, {t}[:,:])" for t in ("uint16", "uint32")))
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


@compiled(*(f"void({t}[:,:], {t}[:,:])" for t in ("uint8", "uint16", "uint32")))
def copy_strips(source: np.ndarray, out: np.ndarray) -> None:
    """out = source, both [rows, columns]; as decode_blocks, fast where a column of `out` lies together."""
    for strip in range(0, source.shape[0], _STRIP):
        from_, to = source[strip:], out[strip:]
        for x in range(source.shape[1]):
            for y in range(min(from_.shape[0], _STRIP)):
                to[y, x] = from_[y, x]


@compiled("void(float32[:,:], int64, int64, int64, int64, int64, int64, float32[:,:])")
def spread_scale(
    scale: np.ndarray,
    row: int,
    column: int,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    out: np.ndarray,
) -> None:
    """out[i, j] = the scale of the block in which the cell lies that begins at (row + j * rows, column + i * columns).
    out: [cells along columns, cells along rows]."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = scale[(row + j * rows) // block_rows, (column + i * columns) // block_columns]


@compiled(
    "void(uint8[:,:], float32[:,:], int64, int64, int64, int64, int64, float32[:,::1], float64[::1])",
    fastmath={"reassoc"},
)
def add_by_code(
    codes: np.ndarray,
    scale: np.ndarray,
    row: int,
    column: int,
    block_rows: int,
    block_columns: int,
    step: int,
    tables: np.ndarray,
    sums: np.ndarray,
) -> None:
    """sums[t] += the sum of tables[t][code] * (the scale of its block)^2 over every `step`-th row of a window that
    begins at (row, column), see decode_values."""
    rows, columns = codes.shape
    for i in range(0, rows, step):
        for j in range(column // block_columns, (column + columns - 1) // block_columns + 1):
            left, right = max(j * block_columns - column, 0), min((j + 1) * block_columns - column, columns)
            source, square = codes[i, left:right], np.float64(scale[(row + i) // block_rows, j]) ** 2
            for t in range(len(tables)):
                table, found = tables[t], np.float32(0)
                for k in range(right - left):
                    found += table[source[k]]
                sums[t] += found * square


@compiled("void(uint8[:,:], float32[:,:], int64, int64, int64, int64, float32[:,::1])")
def decode_values(
    codes: np.ndarray, scale: np.ndarray, row: int, column: int, block_rows: int, block_columns: int, out: np.ndarray
) -> None:
    """out[i, j] = value of codes[i, j] * the scale of its block, for a window [rows, columns] of a matrix of FP8 e4m3
    that begins at (row, column)."""
    rows, columns = codes.shape
    for i in range(rows):
        for j in range(column // block_columns, (column + columns - 1) // block_columns + 1):
            left, right = max(j * block_columns - column, 0), min((j + 1) * block_columns - column, columns)
            source, target, factor = codes[i, left:right], out[i, left:right], scale[(row + i) // block_rows, j]
            for k in range(right - left):
                magnitude = np.uint32(source[k] & np.uint8(0x7F))
                normal = np.uint32((magnitude + np.uint32(960)) << np.uint32(20)).view(np.float32)
                value = normal if magnitude >= np.uint32(8) else np.float32(np.int32(magnitude)) * np.float32(2**-9)
                target[k] = np.float32((value if source[k] < np.uint8(0x80) else -value) * factor)


@compiled("void(float32[:,::1], int64, int64, uint8[:,:], float32[:,:], float64[::1])", fastmath={"reassoc"})
def quantize_cells(
    values: np.ndarray, cell_rows: int, cell_columns: int, codes: np.ndarray, scale: np.ndarray, sums: np.ndarray
) -> None:
    """codes = values / scale rounded to FP8 e4m3 (ties to even), scale [cells down, cells across] = the largest
    magnitude of the cell / 240: no code is larger, none is cut. Adds sum(values^2) and sum((code * scale - value)^2) to
    `sums`. A cell of zeros has scale 1; scales are normal numbers, so that a quotient is never larger than 240.
    """
    for i in range(values.shape[0] // cell_rows):
        for j in range(values.shape[1] // cell_columns):
            left, right = j * cell_columns, (j + 1) * cell_columns
            largest, norm, error = np.uint32(0), np.float64(0), np.float64(0)
            for y in range(i * cell_rows, (i + 1) * cell_rows):
                row, squares = values[y, left:right], np.float32(0)
                for x in range(cell_columns):
                    largest = max(largest, np.uint32(np.float32(row[x]).view(np.uint32) & np.uint32(0x7FFFFFFF)))
                    squares += row[x] * row[x]
                norm += squares
            step = np.float32(max(np.uint32(largest).view(np.float32) / np.float32(240), np.float32(2.0**-126)))
            step = np.float32(1) if largest == 0 else step
            scale[i, j] = step
            for y in range(i * cell_rows, (i + 1) * cell_rows):
                row, target, squares = values[y, left:right], codes[y, left:right], np.float32(0)
                for x in range(cell_columns):
                    bits = np.float32(row[x] / step).view(np.uint32)
                    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
                    quotient = np.uint32(magnitude).view(np.float32)
                    # Three bits of mantissa stay; below 2**-6 steps of 2**-9, which adding 2**14 rounds to.
                    kept = np.uint32(magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1)))
                    kept = np.uint32(kept >> np.uint32(20))
                    small = np.uint32(np.float32(quotient + np.float32(2**14)).view(np.uint32) & np.uint32(0xF))
                    normal = magnitude >= np.uint32(121 << 23)
                    code = np.uint32(kept - np.uint32(960)) if normal else small
                    rounded = np.uint32(kept << np.uint32(20)).view(np.float32)
                    rounded = rounded if normal else np.float32(np.int32(small)) * np.float32(2**-9)
                    squares += (rounded - quotient) * (rounded - quotient)
                    target[x] = np.uint8(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))
                error += squares
            sums[0] += norm
            sums[1] += error * step * step
