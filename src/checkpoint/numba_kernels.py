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


def _compiled(*signatures: str) -> Callable[[Callable], Callable]:
    def decorate(function: Callable) -> Callable:
        compiled = None

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                with _LOCK:
                    compiled = compiled or _compile(function, list(signatures))
            return compiled(*args)

        return call

    return decorate


def _compile(function: Callable, signatures: list[str]) -> Callable:
    import numba

    try:
        return numba.njit(signatures, nogil=True, cache=True)(function)
    except Exception:  # what is wrong with the cache; what is wrong with the function comes again
        return numba.njit(signatures, nogil=True)(function)


@_compiled("uint8(uint8[::1])", "uint16(uint16[::1])", "uint32(uint32[::1])")
def largest_magnitude(bits: np.ndarray) -> int:
    """The largest of the bits of floats [n] without their signs: in all float formats the order of the magnitudes,
    infinity and NaN above all numbers."""
    one = bits.dtype.type(1)
    mask = bits.dtype.type((one << (8 * bits.itemsize - 1)) - one)
    largest = bits.dtype.type(0)
    for i in range(bits.shape[0]):
        largest = max(largest, bits.dtype.type(bits[i] & mask))
    return largest


@_compiled(*(f"void(uint8[:,:], {t}[:,:,::1], int64, int64, int64, int64, {t}[:,:])" for t in ("uint16", "uint32")))
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


@_compiled(*(f"void({t}[:,:], {t}[:,:])" for t in ("uint16", "uint32")))
def copy_strips(source: np.ndarray, out: np.ndarray) -> None:
    """out = source, both [rows, columns]; as decode_blocks, fast where a column of `out` lies together."""
    for strip in range(0, source.shape[0], _STRIP):
        from_, to = source[strip:], out[strip:]
        for x in range(source.shape[1]):
            for y in range(min(from_.shape[0], _STRIP)):
                to[y, x] = from_[y, x]
