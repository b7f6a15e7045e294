"""Experts stored as one tensor of all, as transformers 5 has them in memory: seen as a tensor for each expert.

gate_up_proj [E, 2I, H] holds each expert's gate, then its up; down_proj [E, H, I]. The parts lie one after the other.
FP8 has gate_up_proj_scale_inv beside it, of blocks, or one for both projections of an expert: [E, 1, 1] or [E].
"""

from collections.abc import Iterator
from dataclasses import replace

from .header import TensorEntry

_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# How the name goes on, and what it is for one expert.
_KINDS = {"": "weight", "_scale_inv": "weight_scale_inv", "_activation_scale": "activation_scale"}
_PARTS = {
    f".mlp.experts.{fused}{kind}": [f"{projection}.{part}" for projection in projections]
    for fused, projections in _PROJECTIONS.items()
    for kind, part in _KINDS.items()
}


def parts_of(name: str, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors that are in a stored one, by the names of the layout: it alone if it is not of fused experts."""
    suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
    shape = entry.shape if len(entry.shape) != 1 else (*entry.shape, 1, 1)
    if suffix is None or len(shape) != 3:
        yield name, entry
        return
    experts, rows, columns = shape
    parts = _PARTS[suffix]
    own = 1 if rows == 1 else len(parts)  # of an expert, in the tensor
    if rows % own:
        yield name, entry
        return
    part = replace(entry, shape=(rows // own, columns))
    prefix, _, _ = name.rpartition(".")
    for expert in range(experts):
        for i, of_expert in enumerate(parts):
            place = expert * own + i % own
            yield f"{prefix}.{expert}.{of_expert}", replace(part, offset=entry.offset + place * part.nbytes)
