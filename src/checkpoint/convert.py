"""Turns Hugging Face tensors into the model's tensors: dequantized, combined, in the model's dtype, checked."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model_config import ModelConfig
from .checkpoint import Checkpoint
from .checks import check_tensors, weight_block_size
from .fp8 import FP8_DTYPE, SCALE_SUFFIX, dequantize_blocks
from .layout import TensorSpec, canonical_name, model_layout, rank_tensor_names


class TensorSource(Protocol):
    """What the converter reads from: a checkpoint folder or a state dict in memory."""

    problems: list[str]

    def names(self) -> Iterator[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype | None: ...
    def describe(self, name: str) -> str: ...
    def is_unreadable(self, name: str) -> bool: ...
    def nonfinite(self) -> list[str]: ...
    def get(self, name: str) -> Tensor: ...


class StateDictSource:
    """A state dict with Hugging Face's names, or those that layout.canonical_name knows: NxDI strips `model.`."""

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self.problems: list[str] = []
        self._tensors = {canonical_name(name): tensor for name, tensor in state_dict.items()}

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def describe(self, name: str) -> str:
        return name

    def is_unreadable(self, name: str) -> bool:
        return False

    def nonfinite(self) -> list[str]:
        """Nothing ahead: converting looks at every value, and there are no bytes to read in vain."""
        return []

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def neuron_state_dict(
    source: TensorSource, config: ModelConfig, dtype: torch.dtype, tp_degree: int
) -> dict[str, Tensor]:
    """All tensors of the model, unsharded, in `dtype` (the router's correction bias in float32), and rank tensors.

    Raises CheckpointError listing missing, extra and misshapen tensors, or naming a tensor that holds NaN.
    """
    check_tensors(source, config)
    state_dict = {spec.name: build_tensor(source, spec, config, dtype) for spec in model_layout(config)}
    state_dict.update((name, torch.arange(tp_degree, dtype=torch.int32)) for name in rank_tensor_names(config))
    return state_dict


def build_tensor(source: TensorSource, spec: TensorSpec, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """One tensor of the model, unsharded."""
    dtype, block_size = spec.dtype(dtype), weight_block_size(config)
    if spec.is_plain:
        return read_weight(source, spec.sources[0].name, dtype, block_size)
    grid = spec.grid
    tensor = torch.empty(spec.shape, dtype=dtype)
    view = tensor.view(grid.experts, grid.rows, grid.columns)
    for i, part in enumerate(spec.sources):
        expert, index = divmod(i, len(grid.blocks))
        block = grid.blocks[index]
        weight = read_weight(source, part.name, dtype, block_size).view(block.rows, block.columns)
        weight = weight.T if block.transposed else weight
        rows, columns = weight.shape
        view[expert, block.row : block.row + rows, block.column : block.column + columns] = weight
    return tensor


def read_weight(source: TensorSource, name: str, dtype: torch.dtype, block_size: tuple[int, int]) -> Tensor:
    """A Hugging Face tensor in `dtype`; float8 weights are multiplied with their block scales."""
    weight = source.get(name)
    if weight.dtype == FP8_DTYPE:
        scale = source.get(name + SCALE_SUFFIX)
        return dequantize_blocks(weight, scale, block_size, dtype, source.describe(name))
    if weight.isnan().any():
        raise CheckpointError(f"{source.describe(name)}: holds NaN; the shard is damaged, download it again")
    return weight.to(dtype)


def dequantized_state_dict(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The checkpoint under Hugging Face's own names without its FP8 encoding: what transformers' class loads."""
    reader, config = checkpoint.reader, checkpoint.config
    check_tensors(reader, config)
    block_size = weight_block_size(config)
    return {
        part.name: read_weight(reader, part.name, dtype, block_size)
        for spec in model_layout(config)
        for part in spec.sources
    }
