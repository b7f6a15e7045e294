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
from .encodings import weight_block_size
from .folder import Checkpoint
from .fp8 import SCALE_SUFFIX
from .layout import checkpoint_layout, layer_of, stores_mtp
from .parallel import run_threads, thread_count
from .quantization import foreign_quantization
from .reader import CheckpointReader
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


_MTP, _IGNORED = "MTP layers", "ignored layers"
_SCALE_KINDS = {"F32": "float32", "BF16": "bfloat16", "U8": "E8M0", "F8_E8M0": "E8M0"}


@dataclass(frozen=True)
class CheckpointSummary:
    """parameters: without scales, MTP layers and ignored layers; active: those that one token uses. bytes_by_dtype and
    bytes_by_part count everything. problems: as shard would report. ignored: what belongs to no part, a line a kind."""

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
        if not name.endswith(SCALE_SUFFIX):
            parameters[part] += prod(entry.shape)
    mtp, _ = parameters.pop(_MTP, 0), parameters.pop(_IGNORED, 0)
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
        quantization=_quantization(reader, config),
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
    if layer is not None and layer >= config.num_hidden_layers:
        return _MTP if has_mtp and layer in config.mtp_layers else _IGNORED
    return next((part for pattern, part in _PARTS.items() if pattern in name), "other")


def _quantization(reader: CheckpointReader, config: ModelConfig) -> str:
    if foreign_quantization(reader, config):
        return "not supported"
    if not any(entry.dtype == "F8_E4M3" for entry in reader.entries.values()):
        return "none"
    scales = {entry.dtype for name, entry in reader.entries.items() if name.endswith(SCALE_SUFFIX)}
    if not scales:
        return "FP8 (e4m3) without scales"
    rows, columns = weight_block_size(config)
    kinds = " and ".join(sorted({_SCALE_KINDS.get(dtype, dtype) for dtype in scales}))
    return f"FP8 (e4m3) in blocks of {rows}x{columns}, {kinds} scales"
