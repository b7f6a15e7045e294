"""Damaged checkpoints: every kind is told before anything is written, all of them at once, with file and tensor."""

import os
import struct

import pytest
import torch
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.summary import inspect_checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_sparse_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError
from safetensors.torch import load_file, save_file
from support.damage import (
    EXPERT,
    INDEX,
    NORM,
    drop,
    in_two_shards,
    misplaced_in_index,
    nan_scale,
    overlapping,
    repeated,
    replace,
    shard_of,
    with_bytes,
    with_config,
    with_entry,
    with_header,
    with_index,
)
from support.encodings import SCALE, edit, write_encoded
from support.models import RELEASED


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return write_encoded(folder, "FP8, float32 scales")


BLOCKS = {"quant_method": "fp8"}
# Damage, then what the message must hold besides the file.
DAMAGES = {
    "wrong dtype": (replace(EXPERT, lambda t: t.view(torch.int8)), f"{EXPERT}: dtype"),
    "other FP8": (replace(EXPERT, lambda t: t.view(torch.float8_e5m2)), f"{EXPERT}: dtype"),
    "FP8 norm": (replace(NORM, lambda t: t.to(torch.float8_e4m3fn)), f"{NORM}: an FP8 tensor that is no matrix"),
    "wrong shape": (replace(EXPERT, lambda t: t[:-1].clone()), f"{EXPERT}: shape [71, 96], expected [72, 96]"),
    "transposed": (replace(EXPERT, lambda t: t.T.contiguous()), f"{EXPERT}: shape [96, 72], expected [72, 96]"),
    "missing expert": (drop(EXPERT), f"{EXPERT}: missing"),
    "missing bias": (drop("model.layers.2.mlp.gate.e_score_correction_bias"), "e_score_correction_bias: missing"),
    "missing scale": (drop(EXPERT + SCALE), f"{EXPERT}: FP8 weight without"),
    "misshapen scale": (
        replace(EXPERT + SCALE, lambda t: t[:-1].clone()),
        f"{EXPERT}{SCALE}: shape [2, 3], expected [3",
    ),
    "wrong dtype of scale": (replace(EXPERT + SCALE, lambda t: t.to(torch.int32)), f"{EXPERT}{SCALE}: dtype"),
    "NaN in scale": (replace(EXPERT + SCALE, nan_scale), f"{EXPERT}{SCALE}: holds NaN"),
    "infinite scale": (replace(EXPERT + SCALE, lambda t: t / 0), f"{EXPERT}{SCALE}: holds NaN or infinity"),
    "NaN in E8M0 scale": (
        replace(EXPERT + SCALE, lambda t: torch.full(t.shape, 255, dtype=torch.uint8)),
        f"{EXPERT}{SCALE}: holds NaN",
    ),
    "scale without weight": (drop(EXPERT), f"{EXPERT}{SCALE}: a scale without its weight"),
    "unknown tensor": (
        lambda d: edit(d, lambda t: t | {"model.layers.1.mlp.what.weight": torch.zeros(2)}, "*1-of*"),
        "model.layers.1.mlp.what.weight: not a tensor of this model",
    ),
    "in two shards": (in_two_shards, f"{EXPERT}: is also in"),
    "twice in a header": (with_header(EXPERT, repeated), f"{EXPERT}: twice in the header"),
    "header longer than the file": (
        with_bytes(EXPERT, lambda c: struct.pack("<Q", 1 << 40) + c[8:]),
        "exceeds the file",
    ),
    "empty file": (with_bytes(EXPERT, lambda c: b""), "exceeds the file of 0"),
    "header is no JSON": (with_header(EXPERT, lambda header: "{" * 40), "its header is not JSON"),
    "header is no object": (with_header(EXPERT, lambda header: "[1, 2]"), "its header is not a JSON object"),
    "overlapping offsets": (with_header(EXPERT, overlapping), f"{EXPERT}: overlaps the tensor before it"),
    "offsets of another size": (with_entry(EXPERT, shape=[71, 96]), f"{EXPERT}: 6912 bytes in the header"),
    "negative offset": (with_entry(EXPERT, data_offsets=[-8, 6904]), f"{EXPERT}: bad entry in the header"),
    "unknown dtype": (with_entry(EXPERT, dtype="F12"), f"{EXPERT}: bad entry in the header (unknown dtype F12)"),
    "truncated": (with_bytes(EXPERT, lambda c: c[:-100]), "not a complete safetensors file"),
    "bytes at the end": (with_bytes(EXPERT, lambda c: c + b"\0" * 8), "not a complete safetensors file"),
    "Git LFS pointer": (
        with_bytes(EXPERT, lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4302\n"),
        "is a Git LFS pointer",
    ),
    "missing shard": (lambda d: shard_of(d, EXPERT).unlink(), "missing; download it"),
    "block size of other scales": (
        with_config(quantization_config=BLOCKS | {"weight_block_size": [64, 64]}),
        "config.json: weight_block_size is [64, 64], the scales are of blocks of [32, 32]",
    ),
    "other config": (with_config(n_routed_experts=8), "not a tensor of this model; do config.json and"),
    "index names another shard": (with_index(misplaced_in_index), f"{EXPERT}: missing, though {INDEX} places it there"),
    "tensor not in the index": (with_index(lambda index: index["weight_map"].pop(EXPERT)), f"{EXPERT}: not in {INDEX}"),
    "wrong total_size": (
        with_index(lambda index: index["metadata"].update(total_size=12345)),
        f"{INDEX}: total_size 12345",
    ),
    "index is no JSON": (lambda d: (d / INDEX).write_text("{"), f"{INDEX}: cannot be read"),
    "no checkpoint": (lambda d: [p.unlink() for p in d.glob("model*")], "neither model.safetensors.index.json nor"),
}


def problems_of(model_dir, tmp_path):
    with pytest.raises(CheckpointError) as error:
        shard_checkpoint(model_dir, tmp_path / "out", 4)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    return getattr(error.value, "problems", [str(error.value)])


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_before_anything_is_written(model_dir, tmp_path, name):
    damage, message = DAMAGES[name]
    damage(model_dir)
    problems = problems_of(model_dir, tmp_path)
    told = [problem for problem in problems if message in problem]
    assert told, problems
    assert any(problem.startswith((str(model_dir), "config.json")) for problem in told)


def test_all_are_told_at_once(model_dir, tmp_path, capsys):
    """With the file and the tensor of each."""
    other = "model.layers.2.mlp.experts.4.up_proj.weight"
    scale = "model.layers.1.mlp.experts.9.down_proj.weight_scale_inv"
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    shards = {shard_of(model_dir, name) for name in (other, scale)}
    lfs = next(path for path in sorted(model_dir.glob("*.safetensors")) if path not in shards)
    drop(bias)(model_dir)
    replace(other, lambda t: t[:-1].clone())(model_dir)
    replace(scale, nan_scale)(model_dir)
    lfs.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    problems = problems_of(model_dir, tmp_path)
    for message in (
        f"{bias}: missing",
        f"{shard_of(model_dir, other)}: {other}: shape",
        f"{shard_of(model_dir, scale)}: {scale}: holds NaN",
        f"{lfs}: is a Git LFS pointer",
    ):
        assert any(message in problem for problem in problems), (message, problems)
    assert main(["inspect", str(model_dir)]) == 1
    printed = capsys.readouterr().out
    assert f"problem: {lfs}: is a Git LFS pointer" in printed
    assert f"{other}: shape" in printed


@pytest.mark.parametrize("writer_counts", ["tensors", "files"])
def test_both_meanings_of_total_size_are_accepted(model_dir, tmp_path, writer_counts):
    paths = list(model_dir.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in paths)
    if writer_counts == "tensors":
        size = sum(tensor.nbytes for path in paths for tensor in load_file(path).values())
    with_index(lambda index: index["metadata"].update(total_size=size))(model_dir)
    shard_checkpoint(model_dir, tmp_path / "out", 4)
    assert len(os.listdir(tmp_path / "out/weights")) == 5


def test_a_checkpoint_in_one_file_needs_no_index(model_dir, tmp_path):
    tensors = {}
    for path in model_dir.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (model_dir / INDEX).unlink()
    save_file(tensors, model_dir / "model.safetensors")
    shard_checkpoint(model_dir, tmp_path / "out", 4)


def test_inspect_counts_the_released_model(tmp_path):
    """Parameters as the technical report states them (arXiv:2412.19437): 671B, of which 37B are active."""
    write_sparse_checkpoint(tmp_path, RELEASED)
    summary = inspect_checkpoint(tmp_path)
    assert summary.tensors == 91991
    assert round(sum(summary.bytes_by_dtype.values()) / 1e9, 1) == 688.6
    assert round(summary.parameters / 1e9) == 671
    assert int(summary.active / 1e9) == 37
    assert (summary.dense_layers, summary.moe_layers, summary.mtp_layers) == (3, 58, 1)
    assert summary.quantization == "FP8 (e4m3) in blocks of 128x128, float32 scales"
    assert not summary.problems
    assert not summary.ignored
