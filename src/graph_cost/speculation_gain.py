"""What speculation is worth by the bounds of two graphs: a plain step, and one that drafts and verifies."""

from collections.abc import Iterator, Sequence
from typing import Any

from .count import GraphCost
from .request import Request
from .time_model import Machine, bound


def gain_lines(
    requests: Sequence[Request], costs: Sequence[GraphCost], machine: Machine, acceptance: float
) -> Iterator[str]:
    """A line for each pair of graphs model,decode and model,speculate of one length and batch: what the draft adds, and
    the tokens per second of the one in the other's. acceptance: the share of the one drafted token that is accepted."""
    plain = {_sizes(request): cost for request, cost in _of_phase(requests, costs, "decode")}
    for request, cost in _of_phase(requests, costs, "speculate"):
        ours = plain.get(_sizes(request))
        if ours is None:
            continue
        ratio = (1 + acceptance) * bound(ours, machine).total / bound(cost, machine).total
        flops = sum(cost.dot_flops.values()) - sum(ours.dot_flops.values())
        collectives = cost.collective_count - ours.collective_count
        yield (
            f"{request}: {flops / 1e9:.2f} GFLOP, {(cost.memory_bytes - ours.memory_bytes) / 1e6:.0f} MB and "
            f"{collectives} collectives more than a plain step; {ratio:.2f} times its "
            f"tokens per second at an acceptance of {acceptance:g}" + ("" if ratio > 1 else ": it does not pay")
        )


def _of_phase(requests: Sequence[Request], costs: Sequence[GraphCost], phase: str) -> Iterator[tuple[Request, Any]]:
    pairs = zip(requests, costs, strict=True)
    return ((request, cost) for request, cost in pairs if request.part == "model" and request.phase == phase)


def _sizes(request: Request) -> tuple[int, int]:
    return request.length, request.batch
