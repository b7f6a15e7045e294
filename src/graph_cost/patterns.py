"""Kinds of instructions in a graph, and which of them no known graph has.

A pattern is an opcode with the element types of its result and operands; where the compiler's work depends on the shape
(dots, sorts, gathers, reductions, collectives and their like), with their ranks and the operation applied too.
Where the device has a kernel that was traced in its executable form, the pattern is the kernel's name.
Known graphs are those of models that are published as running on Neuron: known by lineage, compiled by nobody here.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .hlo import Graph, Instruction, Shape
from .kernels import target

INVENTORY = "known_graphs.json"  # in data/; written by tools/known_graphs.py
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BY_RANK = (
    *_COLLECTIVES,
    *("concatenate", "custom-call", "dot", "dynamic-slice", "dynamic-update-slice", "gather", "pad", "reduce"),
    *("reduce-window", "reverse", "scatter", "select-and-scatter", "sort"),
)
_NO_WORK = ("constant", "get-tuple-element", "parameter", "tuple")
_ALIGNMENT = 4  # bytes
_NOT_THE_MODEL = ("/torch/", "/torch_xla/", "/graph_cost/neuron_ops.py", "/neuronx_distributed/parallel_layers/")
_KERNEL_FORMS = "/device_graphs/executable_kernels.py"


@dataclass(frozen=True)
class Found:
    """A pattern of one graph. places: where in the source it comes from, the most frequent first."""

    pattern: str
    count: int
    places: tuple[str, ...]


def find_patterns(module: dict[str, Any]) -> list[Found]:
    """All patterns of an HloModuleProto as JSON, in the order of their names."""
    applied = {item["id"]: item["instructions"][-1]["opcode"] for item in module["computations"]}
    places = _Places(module.get("stackFrameIndex", {}))
    found: dict[str, dict[str, int]] = {}
    for instruction in Graph.from_json(module).instructions:
        if instruction.opcode not in _NO_WORK:
            place, kernel = places.of(instruction)
            pattern = f"Neuron kernel {kernel}" if kernel else _pattern(instruction, applied)
            by_place = found.setdefault(pattern, {})
            by_place[place] = by_place.get(place, 0) + 1
    return [
        Found(pattern, sum(by_place.values()), tuple(sorted(filter(None, by_place), key=lambda p: -by_place[p])))
        for pattern, by_place in sorted(found.items())
    ]


def unknown(found: Iterable[Found], known: dict[str, list[str]]) -> list[Found]:
    """Those that are not in the inventory."""
    return [item for item in found if item.pattern not in known]


def read_inventory() -> tuple[list[str], dict[str, list[str]]]:
    """The models that the inventory was made from, and each known pattern with those of them that have it."""
    text = resources.files(__package__.rpartition(".")[0]).joinpath("data", INVENTORY).read_text()
    inventory = json.loads(text)
    models = inventory["models"]
    return models, {pattern: [models[i] for i in places] for pattern, places in inventory["patterns"].items()}


def _pattern(instruction: Instruction, applied: dict[str, str]) -> str:
    opcode = instruction.opcode
    taken = [shape for operand in instruction.operands for shape in operand.shapes]
    if opcode not in _BY_RANK:
        types = sorted({shape.dtype.lower() for shape in taken})
        given = ", ".join(shape.dtype.lower() for shape in instruction.shapes)
        return f"{opcode} {given} of {', '.join(types)}" if types else f"{opcode} {given}"
    name = f"{opcode} {target(instruction)}" if opcode == "custom-call" else opcode
    computations = instruction.fields.get("calledComputationIds", [])
    name += "".join(f" by {applied[number]}" for number in computations)
    operands = list(map(_form, taken))
    if opcode == "concatenate":
        operands = sorted(set(operands))
    odd = opcode in _COLLECTIVES and any(shape.bytes % _ALIGNMENT for shape in taken if shape.dims)
    suffix = f", not of a multiple of {_ALIGNMENT} bytes" if odd else ""
    forms = ", ".join(map(_form, instruction.shapes))
    return f"{name} {forms} of {', '.join(operands)}{suffix}"


def _form(shape: Shape) -> str:
    return f"{shape.dtype.lower()} rank {len(shape.dims)}"


class _Places:
    """Lines of the model's source, from the frames that torch_xla notes for each instruction."""

    def __init__(self, index: dict[str, Any]):
        self._index = index

    def of(self, instruction: Instruction) -> tuple[str, str]:
        """The innermost line of the model, and the kernel that the device has in the instruction's place; "" each."""
        kernel = ""
        for file, line, function in self._frames(instruction):
            if file.endswith(_KERNEL_FORMS):
                kernel = function
            elif not any(part in file for part in _NOT_THE_MODEL):
                return f"{file.rpartition('/')[2]}:{line} {function}", kernel
        return "", kernel

    def _frames(self, instruction: Instruction) -> Iterator[tuple[str, int, str]]:
        """File, line and function, from the innermost outwards."""
        number = int(instruction.fields.get("metadata", {}).get("stackFrameId", 0))
        while number:
            frame = self._index["stackFrames"][number - 1]
            location = self._index["fileLocations"][int(frame["fileLocationId"]) - 1]
            file = self._index["fileNames"][int(location["fileNameId"]) - 1]
            yield file, location["line"], self._index["functionNames"][int(location["functionNameId"]) - 1]
            number = int(frame.get("parentFrameId", 0))
