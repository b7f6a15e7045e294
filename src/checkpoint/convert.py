"""Turns Hugging Face tensors into the model's tensors: dequantized, combined, in the model's dtype, checked."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .fp8 import FP8_DTYPE, SCALE_SUFFIX, dequantize_blocks, scale_shape
from .layout import Combine, TensorSpec, model_layout, rank_tensor_names
from .reader import CheckpointReader

if TYPE_CHECKING:
    from ..config import DeepseekV3InferenceConfig

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_SHOWN_PROBLEMS = 8


class TensorSource(Protocol):
    """What the converter reads from: a checkpoint folder or a state dict in memory."""

    def names(self) -> Iterator[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def is_fp8(self, name: str) -> bool: ...
    def get(self, name: str) -> Tensor: ...


class StateDictSource:
    """A state dict with Hugging Face's names, with or without the leading `model.`, which NxDI strips."""

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self._tensors = {_full_name(name): tensor for name, tensor in state_dict.items()}

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def is_fp8(self, name: str) -> bool:
        return self._tensors[name].dtype == FP8_DTYPE

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def neuron_state_dict(source: TensorSource, config: "DeepseekV3InferenceConfig") -> dict[str, Tensor]:
    """All tensors of the model, unsharded, in neuron_config.torch_dtype (the router's correction bias in float32).

    Raises CheckpointError listing missing, extra and misshapen tensors, or naming a tensor that holds NaN.
    """
    check_tensors(source, config)
    state_dict = {spec.name: build_tensor(source, spec, config) for spec in model_layout(config)}
    tp_degree = config.neuron_config.tp_degree
    state_dict.update((name, torch.arange(tp_degree, dtype=torch.int32)) for name in rank_tensor_names(config))
    return state_dict


def build_tensor(source: TensorSource, spec: TensorSpec, config: "DeepseekV3InferenceConfig") -> Tensor:
    """One tensor of the model, unsharded."""
    dtype = torch.float32 if spec.float32 else config.neuron_config.torch_dtype
    block_size = weight_block_size(config)
    if spec.combine is Combine.ROWS:
        parts = [read_weight(source, part.name, dtype, block_size) for part in spec.sources]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    fused = torch.empty(spec.shape, dtype=dtype)
    per_expert = len(spec.sources) // spec.shape[0]
    width = spec.shape[2] // per_expert
    for i, part in enumerate(spec.sources):
        expert, column = divmod(i, per_expert)
        weight = read_weight(source, part.name, dtype, block_size)
        fused[expert, :, column * width : (column + 1) * width] = weight.T
    return fused


def read_weight(source: TensorSource, name: str, dtype: torch.dtype, block_size: tuple[int, int]) -> Tensor:
    """A Hugging Face tensor in `dtype`; float8 weights are multiplied with their block scales."""
    weight = source.get(name)
    if weight.dtype == FP8_DTYPE:
        return dequantize_blocks(weight, source.get(name + SCALE_SUFFIX), block_size, dtype, name)
    if not weight.is_floating_point():
        raise CheckpointError(f"{name}: dtype {weight.dtype} is not supported; use an FP8, BF16 or FP32 checkpoint")
    if weight.isnan().any():
        raise CheckpointError(f"{name}: holds NaN; the shard is damaged, download it again")
    return weight.to(dtype)


def dequantized_state_dict(
    model_dir: str | Path, config: "DeepseekV3InferenceConfig", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The checkpoint under Hugging Face's own names without its FP8 encoding: what transformers' class loads."""
    reader = CheckpointReader(model_dir)
    check_tensors(reader, config)
    block_size = weight_block_size(config)
    return {
        part.name: read_weight(reader, part.name, dtype, block_size)
        for spec in model_layout(config)
        for part in spec.sources
    }


def weight_block_size(config: "DeepseekV3InferenceConfig") -> tuple[int, int]:
    """`weight_block_size` of config.json's quantization_config; 128x128, the released size, where it says nothing."""
    quantization = getattr(config, "quantization_config", None) or {}
    rows, cols = quantization.get("weight_block_size") or (128, 128)
    if not (isinstance(rows, int) and isinstance(cols, int) and rows > 0 and cols > 0):
        raise CheckpointError(f"config.json: weight_block_size {[rows, cols]} must be two positive integers")
    return rows, cols


def check_tensors(source: TensorSource, config: "DeepseekV3InferenceConfig") -> None:
    """Raises one CheckpointError that lists every tensor that is missing, unexpected or of the wrong shape."""
    expected = {part.name: part.shape for spec in model_layout(config) for part in spec.sources}
    block_size = weight_block_size(config)
    problems = [f"{name}: missing" for name in expected if name not in source]
    for name in source.names():
        weight = name.removesuffix(SCALE_SUFFIX)
        if name in expected:
            if source.shape(name) != expected[name]:
                problems.append(f"{name}: shape {list(source.shape(name))}, expected {list(expected[name])}")
        elif name != weight and weight in expected:
            want = scale_shape(expected[weight], block_size)
            if source.shape(name) != want:
                problems.append(f"{name}: shape {list(source.shape(name))}, expected {list(want)}")
        elif name != weight and weight not in source:
            problems.append(f"{name}: a scale without its weight {weight}")
        elif not is_ignored(name, config):
            problems.append(f"{name}: not a tensor of this model")
    unscaled = (name for name in expected if name in source and name + SCALE_SUFFIX not in source)
    problems += [f"{name}: FP8 weight without {name}{SCALE_SUFFIX}" for name in unscaled if source.is_fp8(name)]
    if problems:
        raise CheckpointError(_summary(problems))


def is_ignored(name: str, config: "DeepseekV3InferenceConfig") -> bool:
    """True for tensors that are left out on purpose: MTP layers (index >= num_hidden_layers), saved RoPE tables, a head
    stored beside tied embeddings."""
    layer = _LAYER.match(name)
    if layer and int(layer.group(1)) >= config.num_hidden_layers:
        return True
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _full_name(name: str) -> str:
    return name if name.startswith(("model.", "lm_head.")) else "model." + name


def _summary(problems: list[str]) -> str:
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return f"checkpoint does not fit config.json: {shown}{more}"
