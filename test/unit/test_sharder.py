"""Rank files: what is in them, on every way of making them, and the way back."""

import json
import os

import numpy as np
import pytest
import torch
from nxdi_deepseek.checkpoint import decoder, sharder
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.unsharder import unshard
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError, ConfigError
from safetensors import safe_open
from safetensors.torch import load_file
from support import models, nxdi
from support.encodings import ENCODINGS, FP8_CONFIG, decoded, write_encoded
from support.reads import count_reads
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp("model"), "FP8, float32 scales")


@pytest.fixture(scope="module")
def rank_files(checkpoint, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("ranks")
    shard_checkpoint(checkpoint, out_dir, 4, with_mtp=True)
    return out_dir


def file_of(out_dir, rank, folder="weights"):
    return out_dir / folder / f"tp{rank}_sharded_checkpoint.safetensors"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_unsharding_gives_the_decoded_checkpoint(tmp_path, encoding, dtype):
    """Names, shapes and values as torch decodes them. Sharding that again decodes nothing and gives the same files."""
    (tmp_path / "model").mkdir()
    write_encoded(tmp_path / "model", encoding)
    shard_checkpoint(tmp_path / "model", tmp_path / "ranks", 8, dtype, with_mtp=True)
    unshard(tmp_path / "ranks", tmp_path / "back")
    expected = decoded(tmp_path / "model", getattr(torch, dtype))
    actual = {}
    for path in (tmp_path / "back").glob("*.safetensors"):
        actual.update(load_file(path))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
    shard_checkpoint(tmp_path / "back", tmp_path / "again", 8, dtype, with_mtp=True)
    for folder in ("weights", "mtp/weights"):
        for rank in range(8):
            again, first = (file_of(tmp_path / out, rank, folder).read_bytes() for out in ("again", "ranks"))
            assert again == first


def test_transformers_loads_what_unshard_writes(rank_files, checkpoint, tmp_path):
    unshard(rank_files, tmp_path / "back")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    expected = decoded(checkpoint, torch.bfloat16)
    for name, parameter in model.named_parameters():
        value = expected[name] if name in expected else fused_experts(expected, name)
        assert torch.equal(parameter, value), name


def fused_experts(tensors, name):
    """How transformers 5 holds the experts of a layer: one [experts, rows, columns], gate above up."""
    experts, _, projection = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
    return torch.stack(
        [
            torch.cat([tensors[f"{experts}.{expert}.{part}.weight"] for part in parts])
            for expert in range(FP8_CONFIG["n_routed_experts"])
        ]
    )


def generate_from_rank_file(model_dir, out_dir, prompts):
    """Runs in a process of its own."""
    model = models.load_model(model_dir, batch_size=len(prompts), tp_degree=2)
    rank_file = load_file(f"{out_dir}/weights/tp{torch.distributed.get_rank()}_sharded_checkpoint.safetensors")
    for name, parameter in model.model.named_parameters():
        if not name.startswith("kv_mgr."):
            parameter.data.copy_(rank_file.pop(name))
    assert all(name.endswith("rank") for name in rank_file)
    return models.greedy(model, prompts, 8)[0].tolist()


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None, "n_shared_experts": 2, "attention_bias": True}])
def test_a_model_generates_the_same_tokens_from_rank_files(tmp_path, fields):
    model_dir = write_encoded(tmp_path / "model", "FP8, float32 scales", FP8_CONFIG | fields)
    shard_checkpoint(model_dir, tmp_path, 2, "float32")
    prompts = models.random_prompts((6, 11))
    expected = models.greedy(models.load_model(model_dir, batch_size=2), prompts, 8)[0].tolist()
    args = (str(model_dir), str(tmp_path), prompts)
    actual = nxdi.run_parallel(generate_from_rank_file, 2, *args, initialize=models.init_embedded)
    assert actual == [expected, expected]


def test_files_are_named_and_numbered(rank_files):
    for rank in range(4):
        for folder in ("weights", "mtp/weights"):
            with safe_open(file_of(rank_files, rank, folder), "pt") as file:
                assert file.get_tensor("rank_util.rank").tolist() == [rank]
    with safe_open(file_of(rank_files, 0), "pt") as file:
        assert not any(name.startswith("layers.3.") for name in file.keys())  # noqa: SIM118
    with safe_open(file_of(rank_files, 0, "mtp/weights"), "pt") as file:
        assert all(name.startswith(("layers.3.", "rank_util")) for name in file.keys())  # noqa: SIM118


def test_mtp_is_left_out_by_default(checkpoint, tmp_path):
    shard_checkpoint(checkpoint, tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["weights"]
    assert sorted(os.listdir(tmp_path / "weights")) == [
        "manifest.json",
        "tp0_sharded_checkpoint.safetensors",
        "tp1_sharded_checkpoint.safetensors",
    ]


def test_with_mtp_needs_an_mtp_layer(tmp_path):
    write_encoded(tmp_path, "FP32", FP8_CONFIG | {"num_nextn_predict_layers": 0})
    with pytest.raises(ConfigError, match="num_nextn_predict_layers is 0"):
        shard_checkpoint(tmp_path, tmp_path / "out", 2, with_mtp=True)


def test_some_ranks_now_and_the_others_later(checkpoint, rank_files, tmp_path):
    assert main(["shard", str(checkpoint), str(tmp_path), "--tp-degree", "4", "--ranks", "1,3"]) == 0
    assert not file_of(tmp_path, 0).exists()
    shard_checkpoint(checkpoint, tmp_path, 4, ranks=[0])
    shard_checkpoint(checkpoint, tmp_path, 4, resume=True)
    for rank in range(4):
        assert file_of(tmp_path, rank).read_bytes() == file_of(rank_files, rank).read_bytes()
    assert (tmp_path / "weights/manifest.json").read_bytes() == (rank_files / "weights/manifest.json").read_bytes()


@pytest.mark.parametrize("page", [4096, 1])
def test_one_rank_reads_what_it_needs(checkpoint, tmp_path, monkeypatch, page):
    """Rows that other ranks hold are not read, nor columns where that spares a page of each row."""
    read = count_reads(monkeypatch)
    monkeypatch.setattr(decoder, "_PAGE", page)
    shard_checkpoint(checkpoint, tmp_path, 8, ranks=[5])
    needed = 0
    for path in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            by_rows = name.endswith(tuple(f"{p}.weight" for p in ("gate_proj", "up_proj", "q_b_proj", "kv_b_proj")))
            by_rows |= name == "lm_head.weight"
            by_columns = name.endswith(("down_proj.weight", "o_proj.weight", "embed_tokens.weight"))
            if "layers.3" not in name and "qkv" not in name:
                needed += tensor.nbytes // 8 if by_rows or (by_columns and page == 1) else tensor.nbytes
    # The scales are read twice, first to check them.
    assert sum(read) < 1.1 * needed


def test_reading_columns_gives_the_same_file(checkpoint, rank_files, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "_PAGE", 1)
    shard_checkpoint(checkpoint, tmp_path, 4, ranks=[2])
    assert file_of(tmp_path, 2).read_bytes() == file_of(rank_files, 2).read_bytes()


def test_threads_and_pieces_do_not_matter(checkpoint, rank_files, tmp_path, monkeypatch):
    from nxdi_deepseek.checkpoint import units

    monkeypatch.setattr(units, "_UNIT_ELEMENTS", 1000)
    shard_checkpoint(checkpoint, tmp_path, 4, jobs=5)
    for rank in range(4):
        assert file_of(tmp_path, rank).read_bytes() == file_of(rank_files, rank).read_bytes()


def test_progress_reaches_the_end(checkpoint, tmp_path):
    seen = []
    summary = shard_checkpoint(checkpoint, tmp_path, 2, with_mtp=True, progress=lambda *bytes_: seen.append(bytes_))
    assert seen == sorted(seen)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert seen[-1] == (size, size)
    assert size == summary.bytes
    assert summary.files == 4


def test_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    assert main(["shard", str(checkpoint), str(tmp_path / "out"), "--tp-degree", "4", "--dry-run"]) == 0
    assert "4 files of" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tp-degree", "7"], "tp_degree 7 does not divide"),
        (["--tp-degree", "0"], "tp_degree 0 must be at least 1"),
        (["--tp-degree", "4", "--ranks", "4"], "not all in 0..3"),
        (["--tp-degree", "4", "--ranks", "a-b"], "give numbers and ranges"),
    ],
)
def test_wrong_arguments_are_one_line(checkpoint, tmp_path, capsys, arguments, message):
    assert main(["shard", str(checkpoint), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_verify_accepts_what_shard_wrote(checkpoint, rank_files, capsys):
    summary = verify_shards(checkpoint, rank_files, sample=1.0)
    tensors = sum(
        tensor.nbytes
        for path in rank_files.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
        if not name.endswith("rank")
    )
    assert summary.bytes == tensors
    assert main(["verify", str(checkpoint), str(rank_files), "--sample", "0.2"]) == 0
    assert "all equal" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(8))
def test_verify_finds_a_flipped_bit(checkpoint, rank_files, tmp_path, seed):
    """Anywhere: in weights, rank tensors, the header."""
    copy = tmp_path / "copy"
    (copy / "weights").mkdir(parents=True)
    for path in (rank_files / "weights").iterdir():
        (copy / "weights" / path.name).write_bytes(path.read_bytes())
    path = file_of(copy, seed % 4)
    content = bytearray(path.read_bytes())
    position = int(np.random.default_rng(seed).integers(len(content)))
    content[position] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        verify_shards(checkpoint, copy, sample=1.0)


def test_verify_finds_another_checkpoint_and_a_missing_file(checkpoint, rank_files, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_encoded(other, "BF16")
    with pytest.raises(CheckpointError, match="differs from the checkpoint") as error:
        verify_shards(other, rank_files, sample=1.0)
    assert f"{file_of(rank_files, 3)}: layers.0.self_attn.q_b_proj.weight" in error.value.problems
    (tmp_path / "copy/weights").mkdir(parents=True)
    manifest = rank_files / "weights/manifest.json"
    (tmp_path / "copy/weights/manifest.json").write_bytes(manifest.read_bytes())
    with pytest.raises(CheckpointError, match="tp3_sharded_checkpoint.safetensors: missing"):
        verify_shards(checkpoint, tmp_path / "copy")


def test_manifest_checksums_are_those_of_the_file(rank_files):
    """Of a tensor in one region: XXH3-64 of its digest."""
    import xxhash

    manifest = json.loads((rank_files / "weights/manifest.json").read_text())
    file = "tp2_sharded_checkpoint.safetensors"
    weight = load_file(rank_files / "weights" / file)["layers.0.mlp.gate_proj.weight"]
    digest = xxhash.xxh3_64_digest(weight.view(torch.uint8).numpy().tobytes())
    assert manifest["xxh3_64"][file]["layers.0.mlp.gate_proj.weight"] == xxhash.xxh3_64_hexdigest(digest)


def test_unshard_needs_every_rank(checkpoint, tmp_path):
    shard_checkpoint(checkpoint, tmp_path / "ranks", 4, ranks=[0, 2])
    with pytest.raises(CheckpointError, match=r"ranks \[1, 3\] were not written"):
        unshard(tmp_path / "ranks", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_sync_interval_is_seconds():
    """The fault tests set it to 0; a default of 0 would make every unit wait for the disk."""
    assert sharder.SYNC_SECONDS >= 1
