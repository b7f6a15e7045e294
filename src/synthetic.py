"""Writes a small random checkpoint in the exact format of the released one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint.fp8 import SCALE_SUFFIX, quantize_blocks
from .checkpoint.layout import Source, layer_layout, model_layout
from .checkpoint.reader import INDEX_FILE
from .config import DeepseekV3InferenceConfig, DeepseekV3NeuronConfig

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
    (model_dir / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (model_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensors(config: dict[str, Any], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    quantization = config.get("quantization_config")
    for source in _sources(config):
        value = _random(source, generator)
        if source.name.endswith("e_score_correction_bias") or not quantization:
            yield source.name, value
        elif source.name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and "eh_proj" not in source.name:
            block_size = quantization.get("weight_block_size", [128, 128])
            yield from zip(
                (source.name, source.name + SCALE_SUFFIX), quantize_blocks(value, tuple(block_size)), strict=True
            )
        else:
            yield source.name, value.to(torch.bfloat16)


def _sources(config: dict[str, Any]) -> Iterator[Source]:
    model_config = DeepseekV3InferenceConfig(DeepseekV3NeuronConfig(), **config)
    for spec in model_layout(model_config):
        yield from spec.sources
    H, vocab = model_config.hidden_size, model_config.vocab_size
    first, count = model_config.num_hidden_layers, model_config.num_nextn_predict_layers
    for layer in range(first, first + count):
        for spec in layer_layout(model_config, layer):
            yield from spec.sources
        prefix = f"model.layers.{layer}."
        for name in ("embed_tokens", "shared_head.head"):
            yield Source(f"{prefix}{name}.weight", (vocab, H))
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield Source(f"{prefix}{name}.weight", (H,))
        yield Source(f"{prefix}eh_proj.weight", (H, 2 * H))


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
