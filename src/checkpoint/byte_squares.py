"""Transposition of FP8 codes, a square of sixteen by sixteen at a time in the processor's vector registers.

Imports numba: import it where it is called (see numba_kernels.py).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .numba_kernels import compiled

_SIDE = 16
_STRIP = 4 * _SIDE  # rows of the source, which are columns of the result: as many bytes as a cache line
_AHEAD = 256  # bytes; processors do not see by themselves that as many rows as a square has are read side by side
_ROW = ir.VectorType(ir.IntType(8), _SIDE)


@compiled("void(uint8[:,:], uint8[:,:], boolean)")
def transpose_codes(source: np.ndarray, out: np.ndarray, halve: bool) -> None:
    """out [columns, rows] = FP8 e4m3 codes [rows, columns], of which those of a row lie together in both.

    halve: those of half the values, ties among the smallest to even; of NaN the result has no meaning.
    """
    rows, columns = source.shape
    start, step, target, target_step = source.ctypes.data, source.strides[0], out.ctypes.data, out.strides[0]
    ahead = _AHEAD if columns > _AHEAD else _STRIP * step
    edge, turned = np.zeros((_SIDE, _SIDE), np.uint8), np.empty((_SIDE, _SIDE), np.uint8)
    for strip in range(0, rows, _STRIP):
        for x in range(0, columns, _SIDE):
            for y in range(strip, min(strip + _STRIP, rows), _SIDE):
                height, width = min(_SIDE, rows - y), min(_SIDE, columns - x)
                if height == _SIDE and width == _SIDE:
                    place, target_place = start + y * step + x, target + x * target_step + y
                    _transpose_square(place, step, target_place, target_step, halve, ahead)
                else:
                    edge[:height, :width] = source[y : y + height, x : x + width]
                    _transpose_square(edge.ctypes.data, _SIDE, turned.ctypes.data, _SIDE, halve, 0)
                    out[x : x + width, y : y + height] = turned[:width, :height]


@intrinsic
def _transpose_square(
    _context: Any,
    source: types.Type,
    source_step: types.Type,
    target: types.Type,
    target_step: types.Type,
    halve: types.Type,
    ahead: types.Type,
) -> Any:
    """Of _SIDE rows of as many bytes; addresses, bytes from row to row, and from here to what is read soon.

    Rows that lie half a square apart are interleaved: a0 a1 .., b0 b1 .. become a0 b0 a1 b1 .. . After four rounds,
    each of which doubles how much of a column lies together, rows are columns.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        source, source_step, target, target_step, halve, ahead = arguments
        rows = [builder.load(_row_at(builder, source, source_step, i), align=1) for i in range(_SIDE)]
        for i in range(_SIDE):
            _prefetch(builder, _row_at(builder, builder.add(source, ahead), source_step, i))
        most = builder.select(halve, _all(8), _all(0))
        rows = [_halved(builder, row, most) for row in rows]
        for _ in range(_SIDE.bit_length() - 1):
            pairs = zip(rows[: _SIDE // 2], rows[_SIDE // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in (_LOWER, _UPPER)]
        for i, row in enumerate(rows):
            builder.store(row, _row_at(builder, target, target_step, i), align=1)
        return context.get_dummy_value()

    return types.void(*4 * [types.intp], types.boolean, types.intp), generate


def _halved(builder: ir.IRBuilder, codes: ir.Value, most: ir.Value) -> ir.Value:
    """The codes lowered by half their magnitude, or by `most` if that is less: half a value is one exponent less, 8,
    from code 16 on; below that codes count steps, of which odd ones become even."""
    half = builder.and_(builder.lshr(codes, _all(1)), _all(0x3F))
    half = builder.add(half, builder.and_(builder.and_(codes, builder.not_(half)), _all(1)))
    return builder.sub(codes, builder.select(builder.icmp_unsigned("<", half, most), half, most))


def _row_at(builder: ir.IRBuilder, base: ir.Value, step: ir.Value, i: int) -> ir.Value:
    return builder.inttoptr(builder.add(base, builder.mul(step, step.type(i))), _ROW.as_pointer())


def _prefetch(builder: ir.IRBuilder, place: ir.Value) -> None:
    """Asks for the memory at `place` to be brought near; places that there are not do no harm."""
    word, anywhere = ir.IntType(32), ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [anywhere, word, word, word])
    to_read, keep, data = word(0), word(3), word(1)
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [anywhere], function)
    builder.call(prefetch, [builder.bitcast(place, anywhere), to_read, keep, data])


def _all(value: int) -> ir.Constant:
    return ir.Constant(_ROW, [value] * _SIDE)


def _interleaved(first: int) -> ir.Constant:
    """Which of the bytes of two rows, one behind the other, make a row when those from `first` on alternate."""
    return ir.Constant(ir.VectorType(ir.IntType(32), _SIDE), [first + i // 2 + i % 2 * _SIDE for i in range(_SIDE)])


_LOWER, _UPPER = _interleaved(0), _interleaved(_SIDE // 2)
