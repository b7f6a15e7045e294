"""Writes checkpoints in the exact format of the released one: small and random, or large and empty."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..model_config import read_model_config
from .fp8 import SCALE_SUFFIX, quantize_blocks, scale_shape
from .header import build_header
from .layout import Source, model_layout, mtp_copies, mtp_layout
from .reader import INDEX_FILE, CheckpointReader
from .stored import PACKED_SUFFIX, WEIGHTS_IN_WORD

_GROUP = 32


def write_checkpoint(model_dir: str | Path, config: dict[str, Any], seed: int = 0, shards: int = 3) -> None:
    """Writes config.json, `shards` safetensors files and their index.

    With quantization_config, the weights that the release quantizes are FP8 with float32 block scales, the rest
    bfloat16 and the router's bias float32; without it, everything is float32.
    """
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(config, torch.Generator().manual_seed(seed)))
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        weight_map.update(dict.fromkeys(names[i::shards], file))
        save_file({name: tensors[name] for name in names[i::shards]}, model_dir / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(model_dir, config, index)


def write_sparse_checkpoint(model_dir: str | Path, config: dict[str, Any], shards: int = 163) -> None:
    """Writes a checkpoint of any size in files of holes: true headers, no disk used, all weights and scales zero.

    With a quantization_config of format pack-quantized the routed experts are INT4 in groups of 32, all else BF16.
    """
    model_dir = Path(model_dir)
    tensors = [tensor for source in _sources(config) for tensor in _sparse_tensors(source, config)]
    shapes = {f"{source.name}_shape": source.shape for source in _sources(config)}
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        part = tensors[i * len(tensors) // shards : (i + 1) * len(tensors) // shards]
        head, entries = build_header(part)
        with (model_dir / file).open("wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(entry.nbytes for entry in entries.values()))
            for name in entries.keys() & shapes.keys():
                out.seek(entries[name].offset)
                out.write(torch.tensor(shapes[name]).numpy().tobytes())
        weight_map.update((name, file) for name, _, _ in part)
    _write_json(model_dir, config, {"metadata": {}, "weight_map": weight_map})


def _sparse_tensors(source: Source, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the tensors that store a weight."""
    stored, (rows, *columns) = _stored_dtype(source, config), source.shape
    if stored == "INT4":
        yield source.name + PACKED_SUFFIX, "I32", (rows, columns[0] // WEIGHTS_IN_WORD)
        yield source.name + "_scale", "BF16", (rows, columns[0] // _GROUP)
        yield source.name + "_shape", "I64", (2,)
        return
    yield source.name, stored, source.shape
    if stored == "F8_E4M3":
        yield source.name + SCALE_SUFFIX, "F32", scale_shape(source.shape, _block_size(config))


def fill_rows(model_dir: str | Path, name: str, count: int, generator: torch.Generator) -> None:
    """Gives the first rows of a bfloat16 tensor random values, where it lies."""
    reader = CheckpointReader(model_dir)
    entry = reader.entries[name]
    values = torch.randn(count, *entry.shape[1:], generator=generator).to(torch.bfloat16)
    with reader.file_of(name).open("r+b") as file:
        file.seek(entry.offset)
        file.write(values.view(torch.uint8).numpy())


def _write_json(model_dir: Path, config: dict[str, Any], index: dict[str, Any]) -> None:
    (model_dir / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (model_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensors(config: dict[str, Any], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    copies, values = mtp_copies(read_model_config(config)), {}
    for source in _sources(config):
        value, stored = _random(source, generator), _stored_dtype(source, config)
        value = values.get(copies.get(source.name), value).clone()  # a copy is stored on its own
        values[source.name] = value
        if stored == "F8_E4M3":
            names = (source.name, source.name + SCALE_SUFFIX)
            yield from zip(names, quantize_blocks(value, _block_size(config)), strict=True)
        else:
            yield source.name, value.to(torch.bfloat16) if stored == "BF16" else value


def _stored_dtype(source: Source, config: dict[str, Any]) -> str:
    """As in the release, by safetensors' names, and INT4; float32 without quantization_config."""
    if source.name.endswith("e_score_correction_bias") or not config.get("quantization_config"):
        return "F32"
    if config["quantization_config"].get("format") == "pack-quantized":
        return "INT4" if ".mlp.experts." in source.name else "BF16"
    quantized = source.name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and "eh_proj" not in source.name
    return "F8_E4M3" if quantized else "BF16"


def _block_size(config: dict[str, Any]) -> tuple[int, int]:
    return tuple(config["quantization_config"].get("weight_block_size", (128, 128)))


def _sources(config: dict[str, Any]) -> Iterator[Source]:
    model_config = read_model_config(config)
    for layout in (model_layout, mtp_layout):
        for spec in layout(model_config):
            yield from spec.sources


def _random(source: Source, generator: torch.Generator) -> Tensor:
    """Scaled so that every part matters: unit-variance activations, routing and attention far from uniform."""
    noise = torch.randn(source.shape, generator=generator)
    if source.name.endswith("e_score_correction_bias"):
        return noise * 0.05
    if source.name.endswith("bias"):
        return noise * 0.1
    if len(source.shape) == 1:
        return 1 + noise * 0.1
    return noise * (0.3 if "embed_tokens" in source.name else 1.4 / source.shape[1] ** 0.5)
