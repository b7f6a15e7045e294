"""What a user is told about the graphs of his model."""

from collections import Counter
from collections.abc import Iterator

from .device_model import BucketGraph, DeviceModel


def describe(model: DeviceModel) -> str:
    """A line per graph: size, collectives with the bytes they carry, bytes of memory, seconds to lower."""
    ranks = model.replicas.count
    lines = [f"device graphs of {ranks} rank{'s' * (ranks > 1)}, executed here (bytes per rank and call):"]
    return "\n".join([*lines, *_graph_lines(model.graphs), _kernel_line(model.kernels)])


def _graph_lines(graphs: list[BucketGraph]) -> Iterator[str]:
    for graph in graphs:
        cost = graph.cost()
        kinds: Counter[str] = Counter()
        for item in cost.collectives:
            kinds[item.kind] += item.count
        payload = sum(item.count * item.payload_bytes for item in cost.collectives)
        collectives = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no collectives"
        yield (
            f"  {graph.name}: {cost.instructions:,} instructions; {collectives}, {payload / 1e6:.3f} MB; "
            f"{cost.min_bytes / 1e6:.2f} MB of memory at least; lowered in {graph.lowering.seconds:.1f} s"
        )


def _kernel_line(kernels: Counter[str]) -> str:
    calls = ", ".join(f"{name} {count}" for name, count in sorted(kernels.items()))
    return f"  Neuron kernels, computed by their formulas here (calls in these graphs): {calls}"
