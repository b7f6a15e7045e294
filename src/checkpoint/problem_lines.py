"""Problems of many tensors as lines for the user: what befalls more than a few of them is told once."""

from collections import defaultdict
from collections.abc import Iterable

_TOLD_EACH = 20


def problem_lines(found: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each (tensor, what is wrong with it). Of more than 20 with the same fault the first stands for all."""
    by_fault: dict[str, list[str]] = defaultdict(list)
    for tensor, fault in found:
        by_fault[fault].append(tensor)
    lines = []
    for fault, tensors in by_fault.items():
        if len(tensors) > _TOLD_EACH:
            lines.append(f"{tensors[0]}: {fault} (the same of {len(tensors) - 1} more tensors)")
        else:
            lines += [f"{tensor}: {fault}" for tensor in tensors]
    return lines
