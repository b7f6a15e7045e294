"""What a checkpoint must be before anything is made of it. Problems are collected, so that all are told at once."""

import re
from collections.abc import Iterator

import numpy as np
import torch

from ..errors import CheckpointError, report_problems
from ..model_config import ModelConfig
from .encodings import read_scale, weight_block_size
from .fp8 import FP8_DTYPE, SCALE_DTYPES, SCALE_SUFFIX, scale_shape
from .layout import TensorSpec, model_layout, mtp_layout
from .source import TensorSource

WEIGHT_DTYPES = (FP8_DTYPE, torch.bfloat16, torch.float16, torch.float32)
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


def check_tensors(source: TensorSource, config: ModelConfig) -> None:
    """Raises one CheckpointError that lists every file that is damaged and every tensor that is missing, unexpected,
    misshapen or of a wrong dtype."""
    problems = source.problems + tensor_problems(source, config, list(model_layout(config)))
    report_problems("checkpoint does not fit config.json", problems)


def tensor_problems(source: TensorSource, config: ModelConfig, specs: list[TensorSpec]) -> list[str]:
    """A line for each tensor that the tensors of `specs` need and `source` lacks or has otherwise, and for each that
    belongs to no part of the model."""
    expected = {part.name: part.shape for spec in specs for part in spec.sources}
    problems = [
        f"{source.describe(name)}: missing" for name in expected if not (name in source or source.is_unreadable(name))
    ]
    block_size = weight_block_size(config)
    for name in source.names():
        weight = name.removesuffix(SCALE_SUFFIX)
        what = None
        if name in expected:
            what = _weight_problem(source, name, expected[name])
        elif is_ignored(name, config):
            continue
        elif name != weight and weight not in source:
            what = None if source.is_unreadable(weight) else f"a scale without its weight {weight}"
        elif name != weight and weight in expected:
            what = _scale_problem(source, name, scale_shape(expected[weight], block_size))
        else:
            what = "not a tensor of this model"
        if what:
            problems.append(f"{source.describe(name)}: {what}")
    return problems


def scale_problems(reader: TensorSource, specs: list[TensorSpec]) -> list[str]:
    """A line for each block scale of `specs` that holds NaN or infinity. Reads all scales, some 0.02 % of the bytes."""
    problems = []
    for name in {part.name: None for spec in specs for part in spec.sources}:
        if name + SCALE_SUFFIX in reader and reader.dtype(name + SCALE_SUFFIX) in SCALE_DTYPES:
            try:
                finite = np.isfinite(read_scale(reader, name)).all()
            except CheckpointError as error:
                # In a file that is cut short, all of them: the header told of it already.
                problems += [] if reader.problems else [str(error)]
                continue
            if not finite:
                what = reader.describe(name + SCALE_SUFFIX)
                problems.append(f"{what}: holds NaN or infinity; download the file again")
    return problems


def is_ignored(name: str, config: ModelConfig) -> bool:
    """True for tensors that are left out on purpose: MTP layers (index >= num_hidden_layers), saved RoPE tables, a head
    stored beside tied embeddings."""
    layer = _LAYER.match(name)
    if layer and int(layer.group(1)) >= config.num_hidden_layers:
        return True
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def extra_names(source: TensorSource, config: ModelConfig) -> Iterator[str]:
    """Names that are ignored although no part of the model, MTP included, has them."""
    known = {part.name for layout in (model_layout, mtp_layout) for spec in layout(config) for part in spec.sources}
    return (name for name in source.names() if name.removesuffix(SCALE_SUFFIX) not in known)


def _weight_problem(source: TensorSource, name: str, shape: tuple[int, ...]) -> str | None:
    dtype = source.dtype(name)
    if source.shape(name) != shape:
        return f"shape {list(source.shape(name))}, expected {list(shape)}"
    if dtype not in WEIGHT_DTYPES:
        return f"dtype {dtype or 'unknown'} is not supported; use an FP8, BF16 or FP32 checkpoint"
    if dtype == FP8_DTYPE and len(shape) != 2:
        return "an FP8 tensor that is no matrix has no block scales; use an original checkpoint"
    scale = name + SCALE_SUFFIX
    if dtype == FP8_DTYPE and scale not in source and not source.is_unreadable(scale):
        return f"FP8 weight without {name}{SCALE_SUFFIX}"
    return None


def _scale_problem(source: TensorSource, name: str, shape: tuple[int, int]) -> str | None:
    if source.dtype(name) not in SCALE_DTYPES:
        return f"dtype {source.dtype(name) or 'unknown'}, expected float32, bfloat16 or E8M0"
    if source.shape(name) != shape:
        return f"shape {list(source.shape(name))}, expected {list(shape)}"
    return None
