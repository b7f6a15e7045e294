"""Counts as text: of one package, or of two side by side."""

from collections.abc import Sequence

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


def format_costs(requests: Sequence[Request], costs: Sequence[GraphCost], machine: Machine) -> str:
    """One line per graph, and below it its collectives."""
    lines = [["graph", *_COLUMNS]]
    for request, cost in zip(requests, costs, strict=True):
        lines.append([str(request), *(_number(column(cost, machine)) for column in _COLUMNS.values())])
        lines += [[f"  {item.count} x {item.kind} {item.payload}"] for item in cost.collectives]
    return _align(lines)


def format_comparison(
    requests: Sequence[Request], theirs: Sequence[GraphCost], ours: Sequence[GraphCost], machine: Machine
) -> str:
    """One line per graph and figure: the other package's, this one's, and how many times the other's is larger."""
    lines = [["graph", "figure", "other", "ours", "ratio"]]
    for request, other, own in zip(requests, theirs, ours, strict=True):
        graph = str(request)
        for title, column in _COLUMNS.items():
            values = column(other, machine), column(own, machine)
            if any(values):
                ratio = f"{values[0] / values[1]:.2f}" if values[1] else "-"
                lines.append([graph, title, *map(_number, values), ratio])
                graph = ""
    return _align(lines)


def _number(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _align(lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right; a line of one cell may be wider than its column."""
    full = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
