"""XLA's HloModuleProto, read from the JSON that torch_xla's lowering context writes."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..dtypes import BY_HLO
from ..errors import GraphCostError


@dataclass(frozen=True)
class Shape:
    """An array: element type by HLO's name (BF16, F32, ...), and its dimensions."""

    dtype: str
    dims: tuple[int, ...] = ()
    dynamic: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def item_bytes(self) -> int:
        if self.dtype not in BY_HLO:
            raise GraphCostError(f"HLO element type {self.dtype} is not known; add its size to dtypes.py")
        return BY_HLO[self.dtype].item_bytes

    @property
    def bytes(self) -> int:
        return self.elements * self.item_bytes

    def __str__(self) -> str:
        return f"{self.dtype.lower()}[{','.join(map(str, self.dims))}]"


@dataclass(eq=False)
class Instruction:
    """An instruction of the entry computation. A tuple's shapes are listed one by one."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: list["Instruction"] = field(default_factory=list)
    users: list["Instruction"] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


@dataclass
class Graph:
    """The entry computation, its instructions in an order in which operands come first; without transposes that leave
    every axis where it is."""

    instructions: list[Instruction]
    root: Instruction

    @classmethod
    def from_json(cls, module: dict[str, Any]) -> "Graph":
        computation = next(item for item in module["computations"] if item["name"] == module["entryComputationName"])
        by_id: dict[str, Instruction] = {}
        for fields in computation["instructions"]:
            operands = [by_id[i] for i in fields.get("operandIds", [])]
            if _leaves_all_in_place(fields):
                by_id[fields["id"]] = operands[0]
                continue
            instruction = Instruction(fields["name"], fields["opcode"], _shapes(fields["shape"]), operands, [], fields)
            for operand in operands:
                operand.users.append(instruction)
            by_id[fields["id"]] = instruction
        return cls(list(dict.fromkeys(by_id.values())), by_id[computation["rootId"]])

    @property
    def parameters(self) -> dict[int, Instruction]:
        """By parameter number."""
        found = (instruction for instruction in self.instructions if instruction.opcode == "parameter")
        return {int(instruction.fields.get("parameterNumber", 0)): instruction for instruction in found}


def _leaves_all_in_place(fields: dict[str, Any]) -> bool:
    """A transpose of no axes, as torch_xla puts behind index_put, is its operand."""
    axes = [int(axis) for axis in fields.get("dimensions", [])]
    return bool(fields["opcode"] == "transpose" and axes == sorted(axes))


def _shapes(fields: dict[str, Any]) -> tuple[Shape, ...]:
    if fields["elementType"] == "TUPLE":
        return tuple(shape for item in fields.get("tupleShapes", []) for shape in _shapes(item))
    dims = tuple(int(size) for size in fields.get("dimensions", []))
    return (Shape(fields["elementType"], dims, any(fields.get("isDynamicDimension", []))),)
