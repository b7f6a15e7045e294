"""Trained weights -> the released format: FP8 blocks with scales, shards with an index, config, tokenizer.

python -m tools.train_tiny.export --build build --out src/data/tiny_deepseek_v3
"""

import argparse
import json
import shutil
from pathlib import Path

from nxdi_deepseek.checkpoint.fp8 import quantize_blocks
from safetensors.torch import load_file, save_file

from .checkpoint import to_released_names
from .model import CONFIG_FILE

BLOCK = (128, 128)
SHARDS = 3
# What DeepSeek-V3 leaves unquantized: embeddings, heads, norms, the router and the MTP layer's eh_proj.
FP8_SUFFIXES = tuple(
    f".{name}.weight"
    for name in (
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
)


def quantize(tensors):
    """FP8 weight and float32 `weight_scale_inv` for the linear layers; the others as they are."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(FP8_SUFFIXES):
            out[name], out[f"{name}_scale_inv"] = quantize_blocks(tensor.float(), BLOCK)
        else:
            out[name] = tensor
    return out


def shard_plan(tensors):
    """Shard number of every tensor, by cumulative bytes in checkpoint order; a weight and its scale stay together."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    plan, seen = {}, 0
    for name, tensor in tensors.items():
        weight = name.removesuffix("_scale_inv")
        plan[name] = plan.get(weight, min(seen * SHARDS // total, SHARDS - 1))
        seen += tensor.nbytes
    return plan


def write_shards(tensors, out):
    """model-0000x-of-0000n.safetensors and model.safetensors.index.json."""
    plan = shard_plan(tensors)
    names = [f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors" for shard in range(SHARDS)]
    for shard, file_name in enumerate(names):
        part = {name: tensor.clone() for name, tensor in tensors.items() if plan[name] == shard}
        save_file(part, out / file_name, metadata={"format": "pt"})
        (out / file_name).chmod(0o644)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: names[plan[name]] for name in sorted(tensors)},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")


def write_config(out):
    """The training config with the release's quantization_config, and generation_config.json."""
    config = json.loads(CONFIG_FILE.read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
    (out / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return config


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build", type=Path, help="folder of corpus.py and train.py")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = write_config(args.out)
    tensors = to_released_names(load_file(args.build / "trained.safetensors"), config["num_hidden_layers"])
    write_shards(quantize(tensors), args.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "heldout_excerpt.txt"):
        shutil.copyfile(args.build / name, args.out / name)
    shutil.copyfile(args.build / "curve.csv", args.out / "training_curve.csv")


if __name__ == "__main__":
    main()
