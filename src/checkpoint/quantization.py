"""How the weights are stored, judged from the tensors together with config.json, which may be wrong or silent."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from math import prod

import torch

from ..model_config import ModelConfig, Quantization
from .fp8 import FP8_DTYPE, SCALE_SUFFIX
from .source import TensorSource
from .stored import PACKED_SUFFIX, WEIGHTS_IN_WORD, Shape, is_scale, scaled_block, weight_block_size, weight_of

_BLOCK_SIZES = (128, 16, 32, 64, 256, 512, 1024)
_UNNAMED = "none"  # where config.json has no quantization_config
_UNSCALED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What the tensors of other formats are called after the last dot: compressed-tensors with zero points or activation
# order, NVFP4 of compressed-tensors and modelopt, GPTQ and AWQ, MLX, bitsandbytes, HQQ.
_FOREIGN = (
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "weight_scale_2",
    "qweight",
    "scales",
    "absmax",
    "SCB",
    "W_q",
)


def with_stored_blocks(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """The config with the block size that the shapes of the scales tell, where config.json says none."""
    if config.quantization and config.quantization.block_size:
        return config
    size = _block_size_of({pair[1:] for pair in _scaled_weights(source) if not _of_rows(*pair[1:])})
    if size is None:
        return config
    return replace(config, quantization=replace(config.quantization or Quantization(_UNNAMED), block_size=size))


def foreign_quantization(source: TensorSource, config: ModelConfig, expected: Mapping[str, Shape]) -> str | None:
    """The line for a checkpoint whose weights are stored in none of the ways of stored.py. expected: shapes of the
    weights that the model has."""
    found = _foreign(source, expected)
    if found is None:
        return None
    name, kind = found
    return (
        f"{source.describe(name)}: {_said(config)}: weights {kind} are not supported; use the release in FP8 (with "
        f"weight{SCALE_SUFFIX} or weight_scale), INT4 (pack-quantized, symmetric) or BF16"
    )


def _foreign(source: TensorSource, expected: Mapping[str, Shape]) -> tuple[str, str] | None:
    """(tensor, what it makes of the weights)."""
    examples = {name.rpartition(".")[2]: name for name in source.names()}
    for kind in _FOREIGN:
        if kind in examples:
            return examples[kind], f"with {kind}"
    for name, entry in source.entries.items():
        weight = weight_of(name)
        if weight not in expected:
            continue
        if name == weight + PACKED_SUFFIX:
            if entry.dtype != "I32":
                return name, f"packed in {entry.dtype}"
            if len(entry.shape) == 2 and entry.shape[1] != -(-expected[weight][-1] // WEIGHTS_IN_WORD):
                bits = 32 * entry.shape[1] / expected[weight][-1]
                if bits in (1, 2, 3, 8, 16):
                    return name, f"packed in {bits:.0f} bits"
    return None


def leftover_scales(source: TensorSource, expected: Container[str]) -> str | None:
    """The line for weights that are no FP8 and yet have scales. They may be codes that must be scaled still, or values
    that are scaled already: both exist, and look alike."""
    weights = (weight_of(name) for name in source.names() if is_scale(name))
    found = [name for name in weights if name in expected and name in source and _is_unscaled(source, name)]
    if not found:
        return None
    dtype = str(source.dtype(found[0])).removeprefix("torch.")
    return (
        f"{source.describe(found[0])}: {dtype}, with scales of FP8 beside it ({len(found)} such weights): scaled "
        "already or not? If yes, remove the scales, else download the release again"
    )


def block_problem(source: TensorSource, config: ModelConfig) -> str | None:
    """The line for scales that are those of another size of blocks than config.json's, or of no blocks at all."""
    scaled = list(_scaled_weights(source))
    size = weight_block_size(config)
    misfits = [pair for pair in scaled if scaled_block(*pair[1:], size) is None]
    if not misfits:
        return None
    name, shape, scale = misfits[0]
    stored = _block_size_of({pair[1:] for pair in scaled if not _of_rows(*pair[1:])})
    if stored:
        return f"config.json: weight_block_size is {list(size)}, the scales are of blocks of {list(stored)}; correct it"
    example = f"{source.describe(name)}: scales of shape {list(scale)} for a weight {list(shape)}"
    if len(misfits) == len(scaled):
        return f"{example}: {_said(config)}: no scale fits blocks of {list(size)}; correct weight_block_size"
    return None


def _said(config: ModelConfig) -> str:
    """What config.json calls the format."""
    found = config.quantization or Quantization(_UNNAMED)
    said = f"quant_method {found.method}" + (f" (format {found.format})" if found.format else "")
    return said if said.isprintable() else ascii(said)


def _is_unscaled(source: TensorSource, name: str) -> bool:
    return source.dtype(name) in _UNSCALED_DTYPES


def _scaled_weights(source: TensorSource) -> Iterator[tuple[str, Shape, Shape]]:
    """(name, its shape, that of its scale) of the FP8 weights that have a scale."""
    for scale in filter(is_scale, source.names()):
        name = weight_of(scale)
        if name in source and source.dtype(name) == FP8_DTYPE and len(source.shape(name)) == 2:
            yield name, source.shape(name), source.shape(scale)


def _of_rows(shape: Shape, scale: Shape) -> bool:
    """Whether the scale is one per tensor, or one per row."""
    return prod(scale) == 1 or scale in ((shape[0],), (shape[0], 1))


def _block_size_of(shapes: set[tuple[Shape, Shape]]) -> tuple[int, int] | None:
    """The size of blocks with which all pairs of (weight, scale) agree, the released one if that does."""
    if not shapes or any(len(scale) != 2 for _, scale in shapes):
        return None
    rows, columns = (
        next((size for size in _BLOCK_SIZES if all(-(-w[axis] // size) == s[axis] for w, s in shapes)), None)
        for axis in (0, 1)
    )
    return (rows, columns) if rows and columns else None
