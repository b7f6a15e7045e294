"""What a checkpoint holds, from its headers alone."""

import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ..model_config import ModelConfig
from .checkpoint import Checkpoint
from .checks import extra_names, tensor_problems, weight_block_size
from .fp8 import SCALE_SUFFIX
from .layout import model_layout, mtp_layout
from .reader import CheckpointReader

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
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


@dataclass(frozen=True)
class CheckpointSummary:
    """parameters: without scales and MTP layers; active: those that one token uses. bytes_by_dtype and bytes_by_part
    count everything. problems: as shard would report. extra: tensors that are ignored and belong to no part."""

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
    extra: list[str] = field(default_factory=list)


def inspect_checkpoint(model_dir: str | Path) -> CheckpointSummary:
    """Reads config.json, the index and all headers, no weights. Raises ConfigError for a config.json that cannot be."""
    with Checkpoint(model_dir) as checkpoint:
        return summarize(checkpoint)


def summarize(checkpoint: Checkpoint) -> CheckpointSummary:
    """As inspect_checkpoint."""
    config, reader = checkpoint.config, checkpoint.reader
    specs = list(model_layout(config))
    mtp_specs = list(mtp_layout(config))
    has_mtp = any(source.name in reader for spec in mtp_specs for source in spec.sources)
    dtypes, parts, parameters = Counter(), Counter(), Counter()
    for name, entry in reader.entries.items():
        part = part_of(name, config)
        dtypes[entry.dtype] += entry.nbytes
        parts[part] += entry.nbytes
        if not name.endswith(SCALE_SUFFIX):
            parameters[part] += prod(entry.shape)
    mtp = parameters.pop("MTP layers", 0)
    total = sum(parameters.values())
    idle = parameters["routed experts"] * (1 - config.num_experts_per_tok / config.n_routed_experts)
    moe = sum(map(config.has_experts, range(config.num_hidden_layers)))
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
        problems=reader.problems + tensor_problems(reader, config, specs + (mtp_specs if has_mtp else [])),
        extra=list(extra_names(reader, config)),
    )


def part_of(name: str, config: ModelConfig) -> str:
    """Which part of the model a Hugging Face tensor belongs to."""
    layer = _LAYER.match(name)
    if layer and int(layer.group(1)) >= config.num_hidden_layers:
        return "MTP layers"
    return next((part for pattern, part in _PARTS.items() if pattern in name), "other")


def _quantization(reader: CheckpointReader, config: ModelConfig) -> str:
    scales = {entry.dtype for name, entry in reader.entries.items() if name.endswith(SCALE_SUFFIX)}
    if not scales:
        return "none"
    rows, columns = weight_block_size(config)
    names = {"F32": "float32", "U8": "E8M0", "F8_E8M0": "E8M0"}
    kinds = " and ".join(sorted({names.get(dtype, dtype) for dtype in scales}))
    return f"FP8 (e4m3) in blocks of {rows}x{columns}, {kinds} scales"
