"""What a checkpoint must be before anything is made of it: one verdict, the same for all that read it."""

from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from ..errors import report_problems
from ..model_config import ModelConfig
from .fp8 import FP8_DTYPE, SCALE_DTYPES, SCALE_SUFFIX, scale_shape
from .layout import checkpoint_layout, is_of_vision, layer_of, stores_mtp
from .problem_lines import problem_lines
from .quantization import block_problem, foreign_quantization, leftover_scales
from .source import TensorSource
from .stored import (
    PACKED_SUFFIX,
    WEIGHTS_IN_WORD,
    is_of_activations,
    is_scale,
    is_stored,
    scale_of,
    scaled_block,
    shape_of,
    weight_block_size,
    weight_of,
)

WEIGHT_DTYPES = (FP8_DTYPE, torch.bfloat16, torch.float16, torch.float32)
_NO_PART = "not a tensor of this model; do config.json and the weights belong together?"


def check_tensors(source: TensorSource, config: ModelConfig) -> None:
    """Raises one CheckpointError that holds all of checkpoint_problems."""
    report_problems("checkpoint does not fit config.json", checkpoint_problems(source, config))


def checkpoint_problems(source: TensorSource, config: ModelConfig) -> list[str]:
    """A line for each file that is damaged and each tensor that is missing, unexpected, misshapen or of a wrong dtype,
    or that is small and holds NaN or infinity. One line where all tensors have the same fault.

    The MTP layers count where the checkpoint has them, whether they are to be used or not.
    """
    expected = {part.name: part.shape for spec in checkpoint_layout(config, source) for part in spec.sources}
    foreign = foreign_quantization(source, config, expected)
    if foreign:
        return [foreign, *source.problems]
    blocks, leftover = block_problem(source, config), leftover_scales(source, expected)
    # One line tells of the shapes of all scales.
    block_size = None if blocks else weight_block_size(config)
    found = [*_missing(source, expected), *_tensor_faults(source, config, expected, block_size)]
    of_all = [line for line in (leftover, blocks) if line]
    return source.problems + of_all + problem_lines(found) + _nonfinite(source, expected)


def is_ignored(name: str, config: ModelConfig) -> bool:
    """True for tensors that are left out on purpose."""
    return _why_ignored(name, config) is not None


def _why_ignored(name: str, config: ModelConfig) -> str | None:
    layer = layer_of(name)
    if layer is not None and layer >= config.num_hidden_layers:
        return f"layer {layer}: num_hidden_layers is {config.num_hidden_layers}"
    if is_of_vision(name):
        return "vision: only the text model runs"
    if config.member.norm_after_experts and name.endswith("post_mlp_layernorm.weight"):
        return "norms after dense MLPs, which the model does not use"
    if config.tie_word_embeddings and name == "lm_head.weight":
        return "head beside tied embeddings"
    return "saved RoPE tables" if name.endswith("rotary_emb.inv_freq") else None


def ignored_tensors(source: TensorSource, config: ModelConfig) -> list[str]:
    """A line for each kind of tensors that no part of the model has, and that are ignored."""
    expected = {part.name for spec in checkpoint_layout(config, source) for part in spec.sources}
    mtp_layers = config.mtp_layers if stores_mtp(config, source) else ()
    kinds: Counter[str] = Counter()
    for name in source.names():
        why = _why_ignored(name, config)
        if why is None or weight_of(name) in expected:
            continue
        layer = layer_of(name)
        kinds[f"MTP layer {layer}, beyond what an MTP layer has" if layer in mtp_layers else why] += 1
    return [f"{kind} ({count} tensors)" for kind, count in kinds.items()]


def _missing(source: TensorSource, expected: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    names = [
        name
        for name in expected
        if not (is_stored(source, name) or source.is_unreadable(name) or source.is_unreadable(name + PACKED_SUFFIX))
    ]
    if len(names) < len(expected):
        return ((source.describe(name), "missing") for name in names)
    what = f"missing, as are all {len(names)} tensors of the model; are these its weights, under other names?"
    return iter([(source.describe(names[0]), what)])


def _tensor_faults(
    source: TensorSource,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    block_size: tuple[int, int] | None,
) -> Iterator[tuple[str, str]]:
    """(tensor, what is wrong with it). block_size None: the shapes of scales are not looked at."""
    for name in source.names():
        weight = weight_of(name)
        what = None
        if name in expected:
            what = _weight_fault(source, name, expected[name])
        elif weight in expected and is_stored(source, weight):
            what = _companion_fault(source, name, weight, expected[weight], block_size)
        elif is_ignored(name, config):
            continue
        elif weight in expected or (is_scale(name) and not is_stored(source, weight)):
            what = None if source.is_unreadable(weight) else "a scale without its weight"
        else:
            what = _NO_PART
        if what:
            yield source.describe(name), what


def _weight_fault(source: TensorSource, name: str, shape: tuple[int, ...]) -> str | None:
    dtype = source.dtype(name)
    if source.shape(name) != shape:
        return f"shape {list(source.shape(name))}, expected {list(shape)}"
    if dtype not in WEIGHT_DTYPES:
        return f"dtype {dtype or 'unknown'} is not supported; use an FP8, INT4, BF16 or FP32 checkpoint"
    if dtype == FP8_DTYPE and len(shape) != 2:
        return "an FP8 tensor that is no matrix has no block scales; use an original checkpoint"
    scale = name + SCALE_SUFFIX
    if dtype == FP8_DTYPE and scale_of(source, name) is None and not source.is_unreadable(scale):
        return f"FP8 weight without its block scales ({SCALE_SUFFIX})"
    return None


def _companion_fault(
    source: TensorSource, name: str, weight: str, shape: tuple[int, ...], block_size: tuple[int, int] | None
) -> str | None:
    """What is wrong with a tensor that belongs to a weight of this shape."""
    packed = weight + PACKED_SUFFIX
    if name == packed:
        return _packed_fault(source, weight, shape)
    if not is_scale(name):
        of_packed = is_of_activations(name) or packed in source
        return None if of_packed else f"belongs to a packed weight, but {PACKED_SUFFIX[1:]} is missing"
    if name != scale_of(source, weight):
        return "a second scale of its weight; remove one of the two"
    dtype, found = source.dtype(name), source.shape(name)
    if dtype not in SCALE_DTYPES:
        return f"dtype {dtype or 'unknown'}, expected float32, bfloat16 or E8M0"
    if packed in source:
        fits = len(found) == 2 and found[0] == shape[0] and found[1] and shape[1] % found[1] == 0
        return None if fits else f"shape {list(found)}, expected [{shape[0]}, groups] with groups dividing {shape[1]}"
    if block_size and scaled_block(source.shape(weight), found, block_size) is None:
        return f"shape {list(found)}, expected {list(scale_shape(source.shape(weight), block_size))}"
    return None


def _packed_fault(source: TensorSource, weight: str, shape: tuple[int, ...]) -> str | None:
    name = weight + PACKED_SUFFIX
    if weight in source:
        return "packed, and stored plainly too; remove one of the two"
    words = (shape[0], -(-shape[1] // WEIGHTS_IN_WORD)) if len(shape) == 2 else None
    if source.shape(name) != words:
        return f"shape {list(source.shape(name))}, expected {list(words or ())} for a weight {list(shape)}"
    missing = [suffix for suffix in ("_scale", "_shape") if weight + suffix not in source]
    if missing and not source.is_unreadable(weight + missing[0]):
        return f"without weight{missing[0]} beside it"
    if not missing and shape_of(source, weight) != shape:
        return f"weight_shape says {list(shape_of(source, weight))}, expected {list(shape)}"
    return None


def _nonfinite(source: TensorSource, expected: Mapping[str, object]) -> list[str]:
    names = [name for name in source.nonfinite() if weight_of(name) in expected]
    return problem_lines((source.describe(name), "holds NaN or infinity; download the file again") for name in names)
