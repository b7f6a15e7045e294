"""A dot on the matrix unit: one operand stays in an array of 128 by 128, the other passes it, a row in each cycle."""

import math
from dataclasses import dataclass

from ..dtypes import BY_HLO
from ..expert_kernel import TILE
from .hlo import Instruction

# The matrix unit takes float32 in four passes.
_WIDE_PASSES = 4


@dataclass(frozen=True)
class Dot:
    """[batch, rows, depth] times [batch, depth, columns]; dtype: of the operands, by HLO's name."""

    dtype: str
    batch: int
    rows: int
    depth: int
    columns: int

    @classmethod
    def of(cls, dot: Instruction) -> "Dot":
        left, right = (operand.shapes[0] for operand in dot.operands)
        numbers = dot.fields["dotDimensionNumbers"]
        depth = math.prod(left.dims[int(axis)] for axis in numbers.get("lhsContractingDimensions", []))
        batch = math.prod(left.dims[int(axis)] for axis in numbers.get("lhsBatchDimensions", []))
        return cls(left.dtype, batch, left.elements // (batch * depth), depth, right.elements // (batch * depth))

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.depth * self.columns

    @property
    def padded_flops(self) -> int:
        """With the part of the array that stays empty."""
        return 2 * TILE * TILE * self._streamed

    @property
    def cycles(self) -> int:
        """Of one array. A type of more than two bytes takes four passes."""
        return self._streamed * (_WIDE_PASSES if BY_HLO[self.dtype].item_bytes > 2 else 1)

    @property
    def _streamed(self) -> int:
        """Rows that pass the array, with the operand in it that leaves fewer of them."""
        rows, depth, columns = (-(-size // TILE) for size in (self.rows, self.depth, self.columns))
        return self.batch * depth * min(self.rows * columns, rows * self.columns)
