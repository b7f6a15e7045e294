"""Checkpoints for the benchmarks: real sizes, cheap content."""

import json
from pathlib import Path

import numpy as np
import torch
from nxdi_deepseek.checkpoint.fp8 import SCALE_SUFFIX, scale_shape
from nxdi_deepseek.checkpoint.layout import model_layout
from nxdi_deepseek.checkpoint.reader import INDEX_FILE
from nxdi_deepseek.example_configs import RELEASED_CONFIG as RELEASED
from nxdi_deepseek.model_config import read_model_config
from safetensors.torch import save_file

# One expert layer with everything around the experts as small as 64 ranks allow.
ONE_LAYER = RELEASED | {
    "first_k_dense_replace": 0,
    "intermediate_size": 64,
    "kv_lora_rank": 32,
    "num_attention_heads": 64,
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 32,
    "v_head_dim": 2,
    "vocab_size": 64,
}
_BLOCK = (128, 128)


def sources(fields):
    """(name, shape, whether it is FP8) of every weight."""
    config = read_model_config(fields)
    for spec in model_layout(config):
        for source in spec.sources:
            yield source.name, source.shape, source.name.endswith(("_proj.weight", "_with_mqa.weight"))


def write_random(model_dir, fields, tensors_per_shard=48):
    """A checkpoint in which every finite FP8 code occurs. Returns the bytes of its tensors."""
    model_dir = Path(model_dir)
    random = np.random.default_rng(0)
    noise = random.integers(0, 127, 1 << 25, dtype=np.uint8) | (random.integers(0, 2, 1 << 25, dtype=np.uint8) << 7)
    shard, weight_map, total = {}, {}, 0

    def flush():
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        save_file(shard, model_dir / file)
        shard.clear()

    for i, (name, shape, fp8) in enumerate(sources(fields)):
        if fp8:
            codes = np.resize(noise[i % 1009 :], shape)
            shard[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            shard[name + SCALE_SUFFIX] = torch.from_numpy(random.random(scale_shape(shape, _BLOCK), np.float32) * 1e-3)
        else:
            shard[name] = torch.from_numpy(random.standard_normal(shape, np.float32)).bfloat16()
        total += shard[name].nbytes
        if len(shard) >= tensors_per_shard:
            flush()
    flush()
    (model_dir / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model_dir / "config.json").write_text(json.dumps(fields))
    return total
