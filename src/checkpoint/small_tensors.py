"""Small tensors, which are read whole before anything is made of a checkpoint: norms, biases, block scales.

They are some 0.02 % of the bytes. They tell damage early, and one fine-tune from another, whose headers are alike.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from .header import TensorEntry
from .stored import is_scale

_MAX_BYTES = 1 << 26
_MAX_SCALE_BYTES = 1 << 18


@dataclass(frozen=True)
class SmallTensors:
    """Of one file. digest: XXH3-64 of their bytes in order of name. nonfinite: names of those with NaN or infinity."""

    digest: str
    nonfinite: tuple[str, ...]


def is_small(name: str, entry: TensorEntry) -> bool:
    """Scales of INT4 are a ninth of its bytes: too many to be read ahead."""
    if is_scale(name):
        return entry.nbytes <= _MAX_SCALE_BYTES
    return len(entry.shape) <= 1 and entry.nbytes <= _MAX_BYTES


def scan_small_tensors(entries: Iterable[tuple[str, TensorEntry]], read: Callable[[str], np.ndarray]) -> SmallTensors:
    """Of the small ones among the tensors of a file. read: the bytes of a tensor, uint8."""
    state, nonfinite = xxhash.xxh3_64(), []
    for name, entry in sorted(entries):
        if is_small(name, entry):
            raw = read(name)
            state.update(raw)
            if not _is_finite(raw, entry.dtype, is_scale(name)):
                nonfinite.append(name)
    return SmallTensors(state.hexdigest(), tuple(nonfinite))


def _is_finite(raw: np.ndarray, dtype: str, scale: bool) -> bool:
    """True also for dtypes that have neither NaN nor infinity, or that no tensor of the model may have."""
    if dtype == "F32":
        return bool(np.isfinite(raw.view(np.float32)).all())
    if dtype == "F16":
        return bool(np.isfinite(raw.view(np.float16)).all())
    if dtype == "BF16":
        return bool(((raw.view(np.uint16) & 0x7F80) != 0x7F80).all())
    if dtype == "F8_E8M0" or (dtype == "U8" and scale):
        return bool((raw != 0xFF).all())
    return True
