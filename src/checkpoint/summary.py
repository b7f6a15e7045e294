"""What a checkpoint holds: from its headers, its small tensors, and if asked for all of its weights."""

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..model_config import ModelConfig
from .checks import ignored_tensors
from .decoder import UnitDecoder
from .folder import Checkpoint
from .layout import Source, checkpoint_layout, is_of_vision, layer_of, stores_mtp
from .parallel import run_threads, thread_count
from .reader import CheckpointReader
from .stored import PACKED_SUFFIX, WEIGHTS_IN_WORD, scale_of, stored_weight, weight_block_size, weight_of
from .units import Unit, plan_units

# The first pattern found in a tensor's name says which part it belongs to.
_PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    ".mlp.experts.": "routed experts",
    ".mlp.shared_experts.": "shared experts",
    ".mlp.gate.": "routers",
    "norm": "norms",
    ".self_attn.": "attention",
    ".mlp.": "dense MLPs",
}


_MTP, _IGNORED, _VISION = "MTP layers", "ignored layers", "vision"
_SCALE_KINDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "E8M0", "F8_E8M0": "E8M0"}


@dataclass(frozen=True)
class CheckpointSummary:
    """parameters: without scales, MTP layers, ignored layers and vision; active: those that one token uses.
    bytes_by_dtype and bytes_by_part count everything. problems: as shard would report. ignored: what belongs to no
    part, a line a kind."""

    files: int
    tensors: int
    parameters: int
    active: int
    mtp_parameters: int
    dense_layers: int
    moe_layers: int
    mtp_layers: int
    quantization: str
    bytes_by_dtype: dict[str, int] = field(default_factory=dict)
    bytes_by_part: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def inspect_checkpoint(model_dir: str | Path, full: bool = False) -> CheckpointSummary:
    """Reads config.json, the index, all headers and the small tensors; with `full` all weights too, to find NaN and
    infinity. Raises ConfigError for a config.json that cannot be."""
    with Checkpoint(model_dir) as checkpoint:
        return summarize(checkpoint, full)


def summarize(checkpoint: Checkpoint, full: bool = False) -> CheckpointSummary:
    """As inspect_checkpoint."""
    config, reader = checkpoint.config, checkpoint.reader
    has_mtp = stores_mtp(config, reader)
    dtypes, parts, parameters = Counter(), Counter(), Counter()
    for name, entry in reader.entries.items():
        part = part_of(name, config, has_mtp)
        dtypes[entry.dtype] += entry.nbytes
        parts[part] += entry.nbytes
        if weight_of(name) == name:
            parameters[part] += prod(entry.shape)
        elif name.endswith(PACKED_SUFFIX):
            parameters[part] += prod(entry.shape) * WEIGHTS_IN_WORD
    mtp, _, _ = (parameters.pop(part, 0) for part in (_MTP, _IGNORED, _VISION))
    total = sum(parameters.values())
    idle = parameters["routed experts"] * (1 - config.num_experts_per_tok / config.n_routed_experts)
    moe = sum(map(config.has_experts, range(config.num_hidden_layers)))
    problems = list(checkpoint.problems)
    # Where the layout does not fit, there is no saying what to decode.
    if full and not problems:
        problems += damaged_weights(checkpoint)
    return CheckpointSummary(
        files=len(reader.files),
        tensors=len(reader.entries),
        parameters=total,
        active=total - round(idle),
        mtp_parameters=mtp,
        dense_layers=config.num_hidden_layers - moe,
        moe_layers=moe,
        mtp_layers=len(config.mtp_layers) if has_mtp else 0,
        quantization=_quantization(checkpoint),
        bytes_by_dtype=dict(dtypes.most_common()),
        bytes_by_part=dict(parts.most_common()),
        problems=problems,
        ignored=ignored_tensors(reader, config),
    )


def damaged_weights(checkpoint: Checkpoint) -> list[str]:
    """Decodes everything as the sharder does, and tells of each tensor that cannot be."""
    reader, config = checkpoint.reader, checkpoint.config
    decoder = UnitDecoder(reader, config, torch.float32)

    def decode(unit: Unit) -> str:
        try:
            for _ in decoder.regions(unit):
                pass
            return ""
        except CheckpointError as error:
            return str(error)

    units = list(plan_units(checkpoint_layout(config, reader)))
    found = run_threads(units, decode, min(thread_count(None), decoder.affordable_jobs(units)))
    return sorted({line for line in found if line})


def part_of(name: str, config: ModelConfig, has_mtp: bool) -> str:
    """Which part of the model a Hugging Face tensor belongs to."""
    layer = layer_of(name)
    if is_of_vision(name):
        return _VISION
    if layer is not None and layer >= config.num_hidden_layers:
        return _MTP if has_mtp and layer in config.mtp_layers else _IGNORED
    return next((part for pattern, part in _PARTS.items() if pattern in name), "other")


def _quantization(checkpoint: Checkpoint) -> str:
    """The ways in which quantized weights are stored, the most common first."""
    reader, config = checkpoint.reader, checkpoint.config
    ways: Counter[str] = Counter()
    for spec in checkpoint_layout(config, reader):
        for source in spec.sources:
            if way := _way(reader, source, config):
                ways[way] += 1
    if any("not supported" in problem for problem in checkpoint.problems):
        return "not supported"
    return "; ".join(way for way, _ in ways.most_common()) or "none"


def _way(reader: CheckpointReader, source: Source, config: ModelConfig) -> str | None:
    """How a quantized weight is stored; None for a plain one, and for one of which that cannot be said."""
    packed = source.name + PACKED_SUFFIX in reader
    if not packed and (source.name not in reader or reader.entries[source.name].dtype != "F8_E4M3"):
        return None
    scale = scale_of(reader, source.name)
    if scale is None or not reader.shape(scale) and packed:
        return f"{'INT4' if packed else 'FP8 (e4m3)'} without scales"
    stored = stored_weight(reader, source.name, source.shape, config)
    if stored.block is None:
        return "FP8 (e4m3) with scales of an unknown kind"
    kind = _SCALE_KINDS.get(reader.entries[scale].dtype, reader.entries[scale].dtype)
    if packed:
        whole = stored.block[1] == source.shape[1]
        return f"INT4 {'with a scale per channel' if whole else f'in groups of {stored.block[1]}'}, {kind} scales"
    if stored.block == weight_block_size(config):
        return f"FP8 (e4m3) in blocks of {stored.block[0]}x{stored.block[1]}, {kind} scales"
    return f"FP8 (e4m3) with a scale per {'tensor' if stored.block == source.shape else 'channel'}, {kind} scales"
