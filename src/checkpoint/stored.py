"""Under which names, and in which way, a checkpoint stores a weight. The tensors decide, not config.json.

- plain: X.weight, BF16, F16 or F32.
- FP8: X.weight e4m3, times X.weight_scale_inv or X.weight_scale: one per block, one per row
  ([rows, 1] or [rows]), or one.
- INT4: X.weight_packed int32 [rows, columns / 8], value + 8 in each four bits, the lowest first, times X.weight_scale
  [rows, groups]; X.weight_shape.

The first is what BF16 releases have, scale_inv what DeepSeek's FP8 releases have, the rest what the library
compressed-tensors writes (formats float-quantized and pack-quantized), and engines that take its names.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from ..model_config import ModelConfig
from .fp8 import SCALE_SUFFIX, scale_shape
from .source import TensorSource

Shape = tuple[int, ...]

PACKED_SUFFIX = "_packed"
SCALE_SUFFIXES = (SCALE_SUFFIX, "_scale")
WEIGHTS_IN_WORD = 8  # INT4 in int32
_COMPANIONS = (*SCALE_SUFFIXES, PACKED_SUFFIX, "_shape")
# What activations are scaled with; they are not quantized here.
_OF_ACTIVATIONS = (".input_scale", ".activation_scale")
_DEFAULT_BLOCK = (128, 128)  # the released size


@dataclass(frozen=True)
class StoredWeight:
    """name: the tensor of values or codes. scale: the tensor of its factors, None for a plain weight. block: rows and
    columns that share a factor. packed: how many weights lie in one element of the tensor."""

    name: str
    scale: str | None = None
    block: tuple[int, int] | None = None
    packed: int = 1


def stored_weight(source: TensorSource, name: str, shape: Shape, config: ModelConfig) -> StoredWeight:
    """How the source stores the weight `name` of this shape; for what checks.checkpoint_problems has accepted."""
    if name + PACKED_SUFFIX in source:
        scale = name + "_scale"
        block = (1, -(-shape[1] // source.shape(scale)[-1]))
        return StoredWeight(name + PACKED_SUFFIX, scale, block, WEIGHTS_IN_WORD)
    if source.entries[name].dtype != "F8_E4M3":
        return StoredWeight(name)
    scale = scale_of(source, name)
    return StoredWeight(name, scale, scaled_block(shape, source.shape(scale), weight_block_size(config)))


def shape_of(source: TensorSource, name: str) -> Shape:
    """The shape of a weight that the source stores in any way."""
    if name in source:
        return source.shape(name)
    entry = source.entries[name + "_shape"]
    raw = source.read_rows(name + "_shape", 0, entry.shape[0], np.empty(entry.nbytes, np.uint8))
    return tuple(raw.view(np.int64 if entry.dtype == "I64" else np.int32).reshape(-1).tolist())


def scale_of(source: TensorSource, weight: str) -> str | None:
    """The name of the scale of a weight, if there is one."""
    return next((weight + suffix for suffix in SCALE_SUFFIXES if weight + suffix in source), None)


def is_stored(source: TensorSource, weight: str) -> bool:
    return weight in source or weight + PACKED_SUFFIX in source


def is_scale(name: str) -> bool:
    return name.endswith(tuple("weight" + suffix for suffix in SCALE_SUFFIXES))


def weight_of(name: str) -> str:
    """The weight that a tensor belongs to: itself, or the one whose scale or shape it is."""
    for suffix in _OF_ACTIVATIONS:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    for suffix in _COMPANIONS:
        if name.endswith("weight" + suffix):
            return name.removesuffix(suffix)
    return name


def is_of_activations(name: str) -> bool:
    return name.endswith(_OF_ACTIVATIONS)


def scaled_block(shape: Shape, scale: Shape, block_size: tuple[int, int]) -> tuple[int, int] | None:
    """The rows and columns of an FP8 weight that share a factor, None where a scale of this shape fits none.

    block_size: that of the blocks, if the factors are those of blocks.
    """
    if len(shape) != 2:
        return None
    if scale == scale_shape(shape, block_size):
        return block_size
    if prod(scale) == 1:
        return shape
    return (1, shape[1]) if scale in ((shape[0],), (shape[0], 1)) else None


def weight_block_size(config: ModelConfig) -> tuple[int, int]:
    """`weight_block_size` of config.json's quantization_config; 128x128, the released size, where it says nothing."""
    return config.quantization and config.quantization.block_size or _DEFAULT_BLOCK
