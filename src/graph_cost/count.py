"""What a graph costs: floating-point operations, bytes, collectives.

The HLO is not optimised, so these are figures to compare graphs by, not a time. Definitions:

min bytes     every parameter that is used read once, every output written once. Where a parameter is only sliced or
              gathered from, the rows taken; a cache that is updated in place costs the rows written.
fused bytes   what moves when an elementwise operation with one reader is fused into it: those with more, matrix
              multiplications, kernels, reductions, sorts, gathers, scatters and collectives read and write memory.
payload       of a collective: the larger of what it takes and what it gives.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import GraphCostError
from ..expert_kernel import CORES, ExpertKernelCost
from .dots import Dot
from .hlo import Graph, Instruction, Shape
from .kernels import kernel_flops, target

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_TAKES_ROWS = ("gather", "dynamic-slice")
_UPDATES_ROWS = {"scatter": 2, "dynamic-update-slice": 1}  # the operand that holds the new rows
_VIEWS = ("bitcast", "convert", "copy", "reshape", "slice", "transpose")
_UNFUSED = ("concatenate", "custom-call", "dot", "reduce", "reduce-window", "select-and-scatter", "sort")
_WITHOUT_MEMORY = ("broadcast", "constant", "get-tuple-element", "iota", "parameter", "tuple")
# Their cost is in another computation, times a count that the graph may not know.
_UNCOUNTED = ("call", "conditional", "convolution", "fusion", "while")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and payload."""

    kind: str
    payload: str
    payload_bytes: int
    count: int


@dataclass(frozen=True)
class GraphCost:
    """Per rank and call of the graph. FLOPs count a multiplication and an addition as two."""

    dot_flops: dict[str, int]  # by element type of the operands, as the next two
    dot_padded_flops: dict[str, int]  # with the part of the matrix unit's array that stays empty
    dot_cycles: dict[str, int]  # of one such array
    kernel_flops: dict[str, int]  # by custom-call target, those without matrix work included
    min_bytes: int
    fused_bytes: int
    instructions: int
    collectives: list[Collective]
    largest_intermediate: str
    largest_intermediate_bytes: int
    # What the graph alone does not tell.
    parameter_bytes: int = 0  # weights on this rank
    parameter_bytes_read: int = 0
    parameters_unread: dict[str, int] = field(default_factory=dict)  # bytes of each weight that the graph does not use
    kv_bytes_per_token: int = 0
    flop_counter: int = 0  # torch's count of the dot FLOPs, on meta tensors
    expert_kernel: ExpertKernelCost | None = None  # all calls together
    expert_kernel_weight_bytes: int = 0  # which min_bytes has once
    kernel_calls: dict[str, int] = field(default_factory=dict)  # of Neuron kernels, those made of XLA's operations too

    @property
    def flops(self) -> int:
        return sum(self.dot_flops.values()) + sum(self.kernel_flops.values())

    @property
    def dot_cycles_per_core(self) -> float:
        """With the dots shared evenly by the two cores of a rank."""
        return sum(self.dot_cycles.values()) / CORES

    @property
    def memory_bytes(self) -> int:
        """min_bytes with what the expert kernel moves in the place of its weights, read once."""
        kernel = self.expert_kernel
        moved = kernel.read_bytes + kernel.written_bytes - self.expert_kernel_weight_bytes if kernel else 0
        return self.min_bytes + moved

    @property
    def collective_count(self) -> int:
        return sum(collective.count for collective in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "GraphCost":
        kernel = fields.get("expert_kernel")
        nested = {"collectives": [Collective(**item) for item in fields["collectives"]]}
        return cls(**fields | nested | {"expert_kernel": kernel and ExpertKernelCost(**kernel)})


def count(graph: Graph) -> GraphCost:
    """Counts a graph. Raises GraphCostError where it is not static or holds what cannot be counted."""
    for instruction in graph.instructions:
        if instruction.opcode in _UNCOUNTED:
            raise GraphCostError(f"HLO {instruction.opcode} {instruction.name} cannot be counted; write it out")
        if any(shape.dynamic for shape in instruction.shapes):
            raise GraphCostError(f"HLO {instruction.name} has a dynamic shape, which Neuron cannot compile")
    dots = [Dot.of(instruction) for instruction in _of(graph, "dot")]
    intermediates = (shape for value in _intermediates(graph) for shape in value.shapes)
    largest = max(intermediates, key=lambda shape: shape.bytes, default=None)
    return GraphCost(
        dot_flops=_by_dtype(dots, "flops"),
        dot_padded_flops=_by_dtype(dots, "padded_flops"),
        dot_cycles=_by_dtype(dots, "cycles"),
        kernel_flops=_kernel_flops(graph),
        min_bytes=sum(map(bytes_read, graph.parameters.values())) + _bytes_written(graph),
        fused_bytes=_fused_bytes(graph),
        instructions=len(graph.instructions),
        collectives=_collectives(graph),
        largest_intermediate=str(largest) if largest else "",
        largest_intermediate_bytes=largest.bytes if largest else 0,
    )


def _by_dtype(dots: list[Dot], figure: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for dot in dots:
        total[dot.dtype] += getattr(dot, figure)
    return dict(total)


def _kernel_flops(graph: Graph) -> dict[str, int]:
    flops: Counter[str] = Counter()
    for call in _of(graph, "custom-call"):
        flops[target(call)] += kernel_flops(call)
    return dict(flops)


def bytes_read(parameter: Instruction) -> int:
    """Bytes of a parameter that must be read at least once."""
    whole = parameter.shapes[0]
    taken = sum(_elements_read(whole, parameter, user) for user in parameter.users)
    return min(taken, whole.elements) * whole.item_bytes


def _elements_read(whole: Shape, value: Instruction, user: Instruction) -> int:
    """How much of a parameter `user` reads of it, `value` being the parameter, a view or an updated version."""
    is_first = user.operands[0] is value
    if user.opcode in _TAKES_ROWS and is_first:
        return user.shapes[0].elements
    if user.opcode in _VIEWS or (user.opcode in _UPDATES_ROWS and is_first):
        taken = sum(_elements_read(whole, user, next_user) for next_user in user.users)
        return min(taken, user.shapes[0].elements)
    handed_back = user.opcode == "tuple" and value.opcode not in _VIEWS
    return 0 if handed_back else value.shapes[0].elements


def _bytes_written(graph: Graph) -> int:
    return sum(map(_output_bytes, _outputs(graph)))


def _outputs(graph: Graph) -> list[Instruction]:
    return graph.root.operands if graph.root.opcode == "tuple" else [graph.root]


def _output_bytes(output: Instruction) -> int:
    """A parameter that is handed back costs nothing, an updated one the new rows."""
    rows, value = 0, output
    while value.opcode in _UPDATES_ROWS:
        rows += value.operands[_UPDATES_ROWS[value.opcode]].bytes
        value = value.operands[0]
    return rows if value.opcode == "parameter" else output.bytes


def _fused_bytes(graph: Graph) -> int:
    outputs = set(_outputs(graph))
    in_memory = {value for value in graph.instructions if value in outputs or _is_kept(value)}
    return sum(_bytes_moved(value, in_memory) for value in in_memory if value.opcode != "parameter")


def _is_kept(value: Instruction) -> bool:
    if value.opcode in (*_UNFUSED, *_COLLECTIVES, *_TAKES_ROWS, *_UPDATES_ROWS):
        return True
    return value.opcode == "parameter" or (value.opcode not in (*_VIEWS, *_WITHOUT_MEMORY) and _readers(value) > 1)


def _readers(value: Instruction) -> int:
    return sum(_readers(user) if user.opcode in _VIEWS else 1 for user in value.users)


def _bytes_moved(value: Instruction, in_memory: set[Instruction]) -> int:
    if value.opcode in _TAKES_ROWS:
        return 2 * value.bytes
    if value.opcode in _UPDATES_ROWS:
        return 2 * value.operands[_UPDATES_ROWS[value.opcode]].bytes
    taken = _elements_taken(value, in_memory)
    return value.bytes + sum(min(source.elements, number) * source.item_bytes for source, number in taken)


def _elements_taken(value: Instruction, in_memory: set[Instruction]) -> Iterator[tuple[Shape, int]]:
    """What is read of each tensor in memory, through the elementwise operations and slices ahead of `value`."""
    taken: Counter[Instruction] = Counter()
    seen = set()
    stack = [(operand, operand.shapes[0].elements) for operand in value.operands]
    while stack:
        source, number = stack.pop()
        if source in in_memory:
            taken[source] += number
        elif source not in seen:
            seen.add(source)
            stack.extend((operand, min(number, operand.shapes[0].elements)) for operand in source.operands)
    return ((source.shapes[0], number) for source, number in taken.items())


def _collectives(graph: Graph) -> list[Collective]:
    found: Counter[tuple[str, str, int]] = Counter()
    for instruction in graph.instructions:
        if instruction.opcode in _COLLECTIVES:
            taken = [shape for operand in instruction.operands for shape in operand.shapes]
            # torch_xla passes a scalar along to keep collectives in order.
            largest = max((*taken, *instruction.shapes), key=lambda shape: shape.bytes)
            found[instruction.opcode, str(largest), largest.bytes] += 1
    return [Collective(*key, number) for key, number in found.items()]


def _intermediates(graph: Graph) -> Iterator[Instruction]:
    for instruction in graph.instructions:
        if instruction.opcode not in (*_WITHOUT_MEMORY, *_UPDATES_ROWS) and not _is_view_of_parameter(instruction):
            yield instruction


def _is_view_of_parameter(value: Instruction) -> bool:
    while value.opcode in _VIEWS:
        value = value.operands[0]
    return value.opcode == "parameter"


def _of(graph: Graph, opcode: str) -> Iterator[Instruction]:
    return (instruction for instruction in graph.instructions if instruction.opcode == opcode)
