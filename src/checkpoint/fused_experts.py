"""Experts stored as one tensor of all, as transformers 5 has them in memory: seen as a tensor for each expert.

gate_up_proj [E, 2I, H] holds each expert's gate, then its up; down_proj [E, H, I]. The parts lie one after the other.
"""

from collections.abc import Iterator
from dataclasses import replace

from .header import TensorEntry

_PARTS = {".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), ".mlp.experts.down_proj": ("down_proj",)}


def parts_of(name: str, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors that are in a stored one, by the names of the layout: it alone if it is not of fused experts."""
    suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
    if suffix is None or len(entry.shape) != 3 or entry.shape[1] % len(_PARTS[suffix]):
        yield name, entry
        return
    experts, rows, columns = entry.shape
    projections = _PARTS[suffix]
    part = replace(entry, shape=(rows // len(projections), columns))
    prefix, _, _ = name.rpartition(".")
    for i in range(experts * len(projections)):
        expert, projection = divmod(i, len(projections))
        place = replace(part, offset=entry.offset + i * part.nbytes)
        yield f"{prefix}.{expert}.{projections[projection]}.weight", place
