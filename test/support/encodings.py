"""The encodings in which checkpoints of the family are released, made from one tiny checkpoint."""

import json

import torch
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from safetensors.torch import load_file, save_file

from support.models import V3

FP8_CONFIG = V3 | {
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
}
ENCODINGS = (
    "FP8, float32 scales",
    "FP8, bfloat16 scales",
    "FP8, E8M0 scales",
    "FP8, E8M0 bytes",
    "BF16",
    "FP16",
    "FP32",
)
SCALE = "_scale_inv"


def write_encoded(model_dir, encoding, config=FP8_CONFIG):
    """Writes `config`'s checkpoint in one of ENCODINGS."""
    if encoding.startswith("FP8"):
        write_checkpoint(model_dir, config)
        edit(model_dir, lambda tensors: {name: _with_scale(name, t, encoding) for name, t in tensors.items()})
        return model_dir
    write_checkpoint(model_dir, {key: value for key, value in config.items() if key != "quantization_config"})
    if encoding != "FP32":
        dtype = {"BF16": torch.bfloat16, "FP16": torch.float16}[encoding]
        edit(model_dir, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    return model_dir


def edit(model_dir, change, file="*"):
    """Replaces the tensors of each shard by change(tensors), and the index with them."""
    index = model_dir / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for path in sorted(model_dir.glob(f"{file}.safetensors")):
        tensors = change(load_file(path))
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map = {name: shard for name, shard in weight_map.items() if shard != path.name}
        weight_map.update(dict.fromkeys(tensors, path.name))
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def decoded(model_dir, dtype):
    """Every tensor under its own name as torch defines it: float32(weight) * scale, rounded once."""
    stored = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        stored.update(load_file(path))
    block = json.loads((model_dir / "config.json").read_text()).get("quantization_config", {}).get("weight_block_size")
    tensors = {}
    for name, tensor in stored.items():
        if name + SCALE in stored:
            scale = stored[name + SCALE]
            scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)
            rows = torch.arange(tensor.shape[0]) // block[0]
            columns = torch.arange(tensor.shape[1]) // block[1]
            tensors[name] = (tensor.to(torch.float32) * scale[rows][:, columns]).to(dtype)
        elif not name.endswith(SCALE):
            tensors[name] = tensor.to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)
    return tensors


def _with_scale(name, tensor, encoding):
    if not name.endswith(SCALE) or "float32" in encoding:
        return tensor
    if "bfloat16" in encoding:
        return tensor.to(torch.bfloat16)
    scale = tensor.log2().round().exp2().to(torch.float8_e8m0fnu)
    return scale.view(torch.uint8) if encoding.endswith("bytes") else scale
