"""Ways to damage a checkpoint folder: each is a function of the folder, for tables of tests."""

import json
import struct

from safetensors.torch import load_file

from support.encodings import edit

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def shard_of(model_dir, name):
    return model_dir / json.loads((model_dir / INDEX).read_text())["weight_map"][name]


def drop(name):
    return lambda d: edit(d, lambda tensors: {n: t for n, t in tensors.items() if n != name})


def replace(name, change):
    return lambda d: edit(d, lambda tensors: {n: change(t) if n == name else t for n, t in tensors.items()})


def with_config(**fields):
    def damage(model_dir):
        path = model_dir / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def with_index(change):
    def damage(model_dir):
        index = json.loads((model_dir / INDEX).read_text())
        change(index)
        (model_dir / INDEX).write_text(json.dumps(index))

    return damage


def with_header(name, change):
    """Rewrites the header of the shard of `name`; change(header) -> header or JSON text."""

    def damage(model_dir):
        path = shard_of(model_dir, name)
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = change(json.loads(content[8 : 8 + length]))
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])

    return damage


def with_entry(name, **fields):
    return with_header(name, lambda header: header | {name: header[name] | fields})


def with_bytes(name, change):
    return lambda d: shard_of(d, name).write_bytes(change(shard_of(d, name).read_bytes()))


def overlapping(header):
    begin, end = header[EXPERT]["data_offsets"]
    return header | {EXPERT: header[EXPERT] | {"data_offsets": [begin - 32, end - 32]}}


def repeated(header):
    text = json.dumps(header)
    return text[:-1] + f', "{EXPERT}": {json.dumps(header[EXPERT])}}}'


def in_two_shards(model_dir):
    tensor = load_file(shard_of(model_dir, EXPERT))[EXPERT]
    other = next(p.stem for p in sorted(model_dir.glob("*.safetensors")) if p != shard_of(model_dir, EXPERT))
    edit(model_dir, lambda tensors: tensors | {EXPERT: tensor}, other)


def misplaced_in_index(index):
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][EXPERT] = files[files.index(index["weight_map"][EXPERT]) - 1]


def nan_scale(scale):
    scale[0, 0] = float("nan")
    return scale
