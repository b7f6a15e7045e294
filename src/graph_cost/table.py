"""Counts as text: of one package, or of two side by side."""

from collections.abc import Iterator, Sequence

from ..dtypes import BY_HLO
from ..expert_kernel import CORES
from .count import GraphCost
from .request import Request
from .time_model import Machine, bound

_COLUMNS = {
    "GFLOP": lambda cost, _: sum(cost.dot_flops.values()) / 1e9,
    "kernel GFLOP": lambda cost, _: sum(cost.kernel_flops.values()) / 1e9,
    "min MB": lambda cost, _: cost.min_bytes / 1e6,
    "fused MB": lambda cost, _: cost.fused_bytes / 1e6,
    "weights MB": lambda cost, _: cost.parameter_bytes / 1e6,
    "read MB": lambda cost, _: cost.parameter_bytes_read / 1e6,
    "KV B/token": lambda cost, _: cost.kv_bytes_per_token,
    "largest MB": lambda cost, _: cost.largest_intermediate_bytes / 1e6,
    "collectives": lambda cost, _: cost.collective_count,
    "instructions": lambda cost, _: cost.instructions,
    "bound ms": lambda cost, machine: bound(cost, machine).total * 1e3,
}
# What a comparison has too, and a table on a line of its own.
_MATRIX_UNIT = {
    "padded GFLOP": lambda cost, _: sum(cost.dot_padded_flops.values()) / 1e9,
    "Mcycles per core": lambda cost, _: cost.dot_cycles_per_core / 1e6,
}
_EXPERT_KERNEL = {
    "kernel padded GFLOP": lambda cost, _: _of_kernel(cost, "padded_flops") / 1e9,
    "kernel Mcycles per core": lambda cost, _: _of_kernel(cost, "cycles") / 1e6,
    "kernel MB": lambda cost, _: (_of_kernel(cost, "read_bytes") + _of_kernel(cost, "written_bytes")) / 1e6,
    "kernel instructions per core": lambda cost, _: _of_kernel(cost, "instructions"),
}


def _of_kernel(cost: GraphCost, figure: str) -> int | None:
    return getattr(cost.expert_kernel, figure) if cost.expert_kernel else 0


def format_costs(requests: Sequence[Request], costs: Sequence[GraphCost], machine: Machine) -> str:
    """One line per graph, and below it the use of the matrix unit and the collectives."""
    lines = [["graph", *_COLUMNS]]
    for request, cost in zip(requests, costs, strict=True):
        lines.append([str(request), *(_number(column(cost, machine)) for column in _COLUMNS.values())])
        lines += [[f"  {line}"] for line in _matrix_unit(cost)]
        lines += [[f"  {item.count} x {item.kind} {item.payload}"] for item in cost.collectives]
    return _align(lines)


def format_comparison(
    requests: Sequence[Request], theirs: Sequence[GraphCost], ours: Sequence[GraphCost], machine: Machine
) -> str:
    """One line per graph and figure: the other package's, this one's, and how many times the other's is larger."""
    lines = [["graph", "figure", "other", "ours", "ratio"]]
    for request, other, own in zip(requests, theirs, ours, strict=True):
        graph = str(request)
        for title, column in (_COLUMNS | _MATRIX_UNIT | _EXPERT_KERNEL).items():
            values = column(other, machine), column(own, machine)
            if any(values):
                ratio = f"{values[0] / values[1]:.2f}" if all(values) else "-"
                lines.append([graph, title, *map(_number, values), ratio])
                graph = ""
    return _align(lines)


def _matrix_unit(cost: GraphCost) -> Iterator[str]:
    """How much of the array is used, with the cycles of one core."""
    useful, padded = sum(cost.dot_flops.values()), sum(cost.dot_padded_flops.values())
    wide = sum(cycles for dtype, cycles in cost.dot_cycles.items() if BY_HLO[dtype].item_bytes > 2)
    if padded:
        share = f", {wide / CORES / 1e6:.3g} of them at a quarter of the speed" if wide else ""
        yield f"dots: {_used(useful, padded)}, {cost.dot_cycles_per_core / 1e6:.3g} Mcycles per core{share}"
    kernel = cost.expert_kernel
    if kernel:
        instructions = "unknown" if kernel.instructions is None else f"{kernel.instructions:,}"
        moved = (kernel.read_bytes + kernel.written_bytes) / 1e6
        yield (
            f"expert kernel: {_used(kernel.flops, kernel.padded_flops)}, {kernel.cycles / 1e6:.3g} Mcycles and "
            f"{instructions} instructions per core, {moved:,.0f} MB moved"
        )


def _used(useful: int, padded: int) -> str:
    return f"{_number(useful / 1e9)} of {_number(padded / 1e9)} GFLOP ({useful / padded:.0%} of the array)"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _align(lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right; a line of one cell may be wider than its column."""
    full = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
