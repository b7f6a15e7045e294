"""Checkpoints of any size that take no disk: safetensors files with holes in the place of most weights."""

import json
import math
import os

import torch
from nxdi_deepseek.checkpoint.layout import model_layout
from nxdi_deepseek.checkpoint.reader import INDEX_FILE

from support.models import make_config

_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def write_sparse_checkpoint(model_dir, fields, token_ids):
    """An FP8 checkpoint in the released format, a file per layer. All weights are zero but for the embeddings of
    `token_ids` and the routers, which are random so that the tokens choose many experts."""
    config = make_config(fields)
    files = {}
    for spec in model_layout(config):
        for source in spec.sources:
            layer = source.name.split(".")[2] if ".layers." in source.name else "rest"
            files.setdefault(f"model-{layer}.safetensors", []).extend(_tensors(source))
    weight_map = {}
    for file, tensors in files.items():
        _write_file(model_dir / file, tensors, token_ids)
        weight_map.update((name, file) for name, _, _ in tensors)
    (model_dir / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model_dir / "config.json").write_text(json.dumps(fields))


def _tensors(source):
    """(name, dtype, shape) of a weight and of its scale."""
    name, shape = source.name, source.shape
    if name.endswith("e_score_correction_bias"):
        return [(name, "F32", shape)]
    if not name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
        return [(name, "BF16", shape)]
    return [(name, "F8_E4M3", shape), (name + "_scale_inv", "F32", tuple(-(-size // 128) for size in shape))]


def _write_file(path, tensors, token_ids):
    header, offset = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -_BYTES[tensor[1]]):
        end = offset + _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + offset)
        for name, entry in header.items():
            start, width = 8 + len(text) + entry["data_offsets"][0], 2 * entry["shape"][-1]
            rows = token_ids if "embed_tokens" in name else range(entry["shape"][0]) if "mlp.gate.w" in name else []
            for row in rows:
                file.seek(start + row * width)
                values = torch.randn(width // 2, generator=generator).bfloat16()
                file.write(values.view(torch.uint8).numpy().tobytes())


def peak_memory_growth(function, *args, **kwargs):
    """Bytes by which a fork of this process grows at most while it runs function, mapped files included."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            start = _status("VmRSS")
            function(*args, **kwargs)
            os.write(write, str(_status("VmHWM") - start).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.wait()
    return int(os.read(read, 32) or b"-1")


def _status(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
