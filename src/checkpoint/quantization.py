"""How the weights are stored, judged from the tensors together with config.json, which may be wrong or silent."""

from collections.abc import Container, Iterator
from dataclasses import replace
from math import prod

import torch

from ..model_config import ModelConfig, Quantization
from .encodings import weight_block_size
from .fp8 import FP8_DTYPE, SCALE_SUFFIX, scale_shape
from .source import TensorSource

Shape = tuple[int, ...]

_BLOCK_SIZES = (128, 16, 32, 64, 256, 512, 1024)
_UNNAMED = "none"  # where config.json has no quantization_config
_UNSCALED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What the tensors of other formats are called after the last dot: compressed-tensors and modelopt, GPTQ and AWQ, MLX,
# bitsandbytes, HQQ.
_FOREIGN = ("weight_packed", "weight_scale", "qweight", "scales", "absmax", "SCB", "W_q")


def with_stored_blocks(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """The config with the block size that the shapes of the scales tell, where config.json says none."""
    if config.quantization and config.quantization.block_size:
        return config
    size = _block_size_of({pair[1:] for pair in _scaled_weights(source)})
    if size is None:
        return config
    return replace(config, quantization=replace(config.quantization or Quantization(_UNNAMED), block_size=size))


def foreign_quantization(source: TensorSource, config: ModelConfig) -> str | None:
    """The line for a checkpoint whose weights are in another format than FP8 with block scales called scale_inv."""
    examples = {name.rpartition(".")[2]: name for name in source.names()}
    for kind in _FOREIGN:
        if kind in examples:
            return (
                f"{source.describe(examples[kind])}: {_said(config)}: weights with {kind} are not supported; use the "
                f"release in FP8 (with weight{SCALE_SUFFIX}) or BF16"
            )
    return None


def leftover_scales(source: TensorSource, expected: Container[str]) -> str | None:
    """The line for weights that are no FP8 and yet have scales. They may be codes that must be scaled still, or values
    that are scaled already: both exist, and look alike."""
    weights = (name.removesuffix(SCALE_SUFFIX) for name in source.names() if name.endswith(SCALE_SUFFIX))
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
    misfits = [(name, shape, scale) for name, shape, scale in scaled if not _fits(shape, scale, size)]
    if not misfits:
        return None
    name, shape, scale = misfits[0]
    stored = _block_size_of({pair[1:] for pair in scaled})
    if stored:
        return f"config.json: weight_block_size is {list(size)}, the scales are of blocks of {list(stored)}; correct it"
    example = f"{source.describe(name + SCALE_SUFFIX)}: shape {list(scale)} for a weight {list(shape)}"
    if all(prod(scale) == 1 for _, _, scale in misfits):
        return f"{example}: {_said(config)}: FP8 with one scale per tensor is not supported yet; use one in blocks"
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
    for scale in source.names():
        name = scale.removesuffix(SCALE_SUFFIX)
        if name != scale and name in source and source.dtype(name) == FP8_DTYPE and len(source.shape(name)) == 2:
            yield name, source.shape(name), source.shape(scale)


def _fits(shape: Shape, scale: Shape, size: tuple[int, int]) -> bool:
    return scale == scale_shape(shape, size)


def _block_size_of(shapes: set[tuple[Shape, Shape]]) -> tuple[int, int] | None:
    """The size of blocks with which all pairs of (weight, scale) agree, the released one if that does."""
    if not shapes or any(len(scale) != 2 for _, scale in shapes):
        return None
    rows, columns = (
        next((size for size in _BLOCK_SIZES if all(-(-w[axis] // size) == s[axis] for w, s in shapes)), None)
        for axis in (0, 1)
    )
    return (rows, columns) if rows and columns else None
