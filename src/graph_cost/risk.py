"""What of a model's graphs no known graph has, as text."""

from collections.abc import Iterable, Sequence

from .patterns import Found, read_inventory, unknown
from .request import Request

_PLACES = 3  # of the source, told for a pattern


def cut(request: Request) -> dict[str, object]:
    """config.json with the layers up to the first one with experts: further layers have the same instructions."""
    model = request.model
    kinds = {model.has_experts(layer): layer for layer in reversed(range(model.num_hidden_layers))}
    return request.config | {"num_hidden_layers": max(kinds.values()) + 1}


def format_risks(requests: Sequence[Request], found: Iterable[list[Found]]) -> str:
    """A line per pattern that is in no known graph: how often, in which graphs, from which lines of the source."""
    models, known = read_inventory()
    rows: dict[str, list[tuple[Request, Found]]] = {}
    for request, patterns in zip(requests, found, strict=True):
        for item in unknown(patterns, known):
            rows.setdefault(item.pattern, []).append((request, item))
    lines = [_line(pattern, hits) for pattern, hits in sorted(rows.items())]
    head = f"{len(lines)} kinds of instructions in {len(requests)} graphs that no known graph has"
    lineage = (
        f"known: {len(known)} kinds in the graphs of {', '.join(models)}, which are published as running on Neuron; "
        "we have compiled none of them"
    )
    return "\n".join([head + ":" * bool(lines), *lines, lineage])


def _line(pattern: str, hits: list[tuple[Request, Found]]) -> str:
    graphs = ", ".join(f"{item.count} in {request}" for request, item in hits)
    places = list(dict.fromkeys(place for _, item in hits for place in item.places))
    shown = "; ".join(places[:_PLACES]) + f"; {len(places) - _PLACES} more" * (len(places) > _PLACES)
    return f"  {pattern}: {graphs}" + f" ({shown})" * bool(shown)
