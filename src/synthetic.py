"""Writes checkpoints in the exact format of the released one: small and random, or large and empty."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint.fp8 import SCALE_SUFFIX, quantize_blocks, scale_shape
from .checkpoint.header import build_header
from .checkpoint.layout import Source, model_layout, mtp_layout
from .checkpoint.reader import INDEX_FILE, CheckpointReader
from .model_config import read_model_config

# Small, but nothing is round: dims that blocks of 128 do not divide, nope != v, groups, a dense first layer, YaRN.
DEMO_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 320,
    "kv_lora_rank": 48,
    "max_position_embeddings": 5120,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 144,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 24,
    "vocab_size": 512,
}

# The sizes of the released 671B model.
RELEASED_CONFIG: dict[str, Any] = DEMO_CONFIG | {
    "attention_dropout": 0.0,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": DEMO_CONFIG["rope_scaling"] | {"original_max_position_embeddings": 4096},
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


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
    """Writes a checkpoint of any size in files of holes: true headers, no disk used, all weights and scales zero."""
    model_dir = Path(model_dir)
    tensors = []
    for source in _sources(config):
        stored = _stored_dtype(source, config)
        tensors.append((source.name, stored, source.shape))
        if stored == "F8_E4M3":
            tensors.append((source.name + SCALE_SUFFIX, "F32", scale_shape(source.shape, _block_size(config))))
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        part = tensors[i * len(tensors) // shards : (i + 1) * len(tensors) // shards]
        head, entries = build_header(part)
        with (model_dir / file).open("wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(entry.nbytes for entry in entries.values()))
        weight_map.update((name, file) for name, _, _ in part)
    _write_json(model_dir, config, {"metadata": {}, "weight_map": weight_map})


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
    for source in _sources(config):
        value, stored = _random(source, generator), _stored_dtype(source, config)
        if stored == "F8_E4M3":
            names = (source.name, source.name + SCALE_SUFFIX)
            yield from zip(names, quantize_blocks(value, _block_size(config)), strict=True)
        else:
            yield source.name, value.to(torch.bfloat16) if stored == "BF16" else value


def _stored_dtype(source: Source, config: dict[str, Any]) -> str:
    """As in the release, by safetensors' names; float32 without quantization_config."""
    if source.name.endswith("e_score_correction_bias") or not config.get("quantization_config"):
        return "F32"
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
