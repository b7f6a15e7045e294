"""Checkpoints quantized by the library compressed-tensors, and what the library itself makes of them again."""

import json

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint

from support.encodings import FP8_CONFIG, edit

BF16_CONFIG = {name: value for name, value in FP8_CONFIG.items() if name != "quantization_config"}
BF16_CONFIG |= {"moe_intermediate_size": 96}  # whole groups
INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
# Name: the library's format, its arguments, dtype of the scales.
FORMATS = {
    "INT4 in groups of 32": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 32}, torch.bfloat16),
    "INT4 in groups of 16": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 16}, torch.float32),
    "INT4 per channel": ("pack-quantized", INT4 | {"strategy": "channel"}, torch.bfloat16),
    "FP8 per tensor": ("float-quantized", FP8 | {"strategy": "tensor"}, torch.float32),
    "FP8 per channel": ("float-quantized", FP8 | {"strategy": "channel"}, torch.bfloat16),
    "FP8 in blocks": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [32, 32]}, torch.float32),
}


def write_compressed(model_dir, name, config=BF16_CONFIG):
    """Writes a checkpoint whose routed experts are in one of FORMATS, all else in BF16. Returns the weights of it in
    BF16, by the library, by Hugging Face name."""
    compressor, arguments, scale_dtype = FORMATS[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    library = BaseCompressor.get_value_from_registry(FORMATS[name][0])
    write_checkpoint(model_dir, config)
    plain = {}

    def compress(tensors):
        written = {}
        for key, tensor in tensors.items():
            if ".experts." not in key:
                plain[key] = written[key] = tensor if "correction_bias" in key else tensor.to(torch.bfloat16)
                continue
            scale = _scale(tensor, arguments).to(scale_dtype)
            packed = library.compress({"weight": tensor, "weight_scale": scale}, scheme)
            plain[key] = library.decompress(packed, scheme)["weight"].to(torch.bfloat16)
            written |= {key.removesuffix("weight") + part: value for part, value in packed.items()}
        return written

    edit(model_dir, compress)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": compressor,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    }
    (model_dir / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return plain


def _scale(weight, arguments):
    """One for each row and group, for each row, for each block or for all, so that the largest weight fits."""
    largest = 7.5 if arguments["type"] == "int" else 448.0
    rows, columns = weight.shape
    if arguments["strategy"] == "tensor":
        return weight.abs().amax().reshape(1) / largest
    if arguments["strategy"] == "block":
        high, wide = arguments["block_structure"]
        padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide)
        padded[:rows, :columns] = weight.abs()
        return padded.unflatten(0, (-1, high)).unflatten(2, (-1, wide)).amax((1, 3)) / largest
    group = arguments.get("group_size", columns)
    return weight.abs().unflatten(1, (-1, group)).amax(2) / largest
