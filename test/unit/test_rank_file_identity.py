"""Rank files are known by the content of their checkpoint: copies of either go on, other weights are refused."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from nxdi_deepseek.checkpoint.sharder import JOURNAL_FILE, shard_checkpoint
from nxdi_deepseek.checkpoint.unsharder import unshard
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError
from nxdi_deepseek.model_config import load_model_config
from safetensors.torch import load_file
from support.damage import EXPERT, NORM, replace, with_config
from support.encodings import SCALE, write_encoded

MANIFEST = "manifest.json"


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "model").mkdir()
    return write_encoded(tmp_path / "model", "FP8, float32 scales")


@pytest.fixture
def out_dir(model_dir, tmp_path):
    shard_checkpoint(model_dir, tmp_path / "out", 2)
    return tmp_path / "out"


def copied(folder):
    """As `cp -r` or tar do: other times, and perhaps another order."""
    copy = folder.with_name(folder.name + " copied")
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    for i, path in enumerate(sorted(copy.rglob("*"), reverse=True)):
        os.utime(path, (1_000_000 + i, 1_000_000 + i))
    return copy


def contents(out_dir):
    return {path.name: path.read_bytes() for path in (out_dir / "weights").iterdir()}


def interrupted(model_dir, out_dir):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard_checkpoint(model_dir, out_dir, 2, jobs=1, progress=stop)
    assert (out_dir / "weights" / JOURNAL_FILE).exists()


def test_copies_are_the_same(model_dir, out_dir):
    model_copy, out_copy = copied(model_dir), copied(out_dir)
    shutil.rmtree(model_dir)
    verify_shards(model_copy, out_copy, sample=1.0)
    assert shard_checkpoint(model_copy, out_copy, 2, resume=True).files == 0
    assert contents(out_copy) == contents(out_dir)


def test_an_unfinished_run_goes_on_with_copies(model_dir, out_dir, tmp_path):
    interrupted(model_dir, tmp_path / "stopped")
    model_copy, out_copy = copied(model_dir), copied(tmp_path / "stopped")
    assert shard_checkpoint(model_copy, out_copy, 2, resume=True).resumed > 0
    assert contents(out_copy) == contents(out_dir)


@pytest.mark.parametrize("name", [NORM, EXPERT + SCALE])
def test_a_fine_tune_is_another_source(model_dir, out_dir, tmp_path, name):
    """Its files have the sizes and headers of the original."""
    interrupted(model_dir, tmp_path / "stopped")
    sizes = {path.name: path.stat().st_size for path in model_dir.iterdir()}
    # With the index that the folder has, for the sizes of all files to stay.
    index = (model_dir / "model.safetensors.index.json").read_text()
    replace(name, lambda t: t * 1.5)(model_dir)
    (model_dir / "model.safetensors.index.json").write_text(index)
    assert {path.name: path.stat().st_size for path in model_dir.iterdir()} == sizes
    with pytest.raises(CheckpointError, match="holds rank files of another source"):
        shard_checkpoint(model_dir, out_dir, 2, resume=True)
    with pytest.raises(CheckpointError, match="the unfinished run had another source"):
        shard_checkpoint(model_dir, tmp_path / "stopped", 2, resume=True)


def test_another_large_weight_is_for_verify_to_find(model_dir, out_dir):
    replace(EXPERT, lambda t: t.view(torch.uint8).clone().fill_(0x38).view(t.dtype))(model_dir)
    shard_checkpoint(model_dir, out_dir, 2, resume=True)
    with pytest.raises(CheckpointError, match=r"differs from the checkpoint: .*gate_up_proj"):
        verify_shards(model_dir, out_dir, sample=1.0)


def test_a_model_of_fewer_layers_than_the_folder(model_dir, tmp_path):
    """The files of the folder whose config.json says so; they verify, and unshard to a model of that size."""
    config = dataclasses.replace(load_model_config(model_dir), num_hidden_layers=2)
    shard_checkpoint(model_dir, tmp_path / "given", 2, config=config)
    verify_shards(model_dir, tmp_path / "given", sample=1.0)
    with pytest.raises(CheckpointError, match="holds rank files of another config"):
        shard_checkpoint(model_dir, tmp_path / "given", 2, resume=True)
    unshard(tmp_path / "given", tmp_path / "back")
    assert load_model_config(tmp_path / "back").num_hidden_layers == 2
    with_config(num_hidden_layers=2)(model_dir)
    shard_checkpoint(model_dir, tmp_path / "said", 2)
    assert contents(tmp_path / "given") == contents(tmp_path / "said")
    tensors = load_file(tmp_path / "said/weights/tp0_sharded_checkpoint.safetensors")
    assert not any(name.startswith("layers.2.") for name in tensors)
    assert shard_checkpoint(model_dir, tmp_path / "given", 2, resume=True).files == 0


def test_defaults_that_are_filled_in_make_no_other_config(model_dir, out_dir):
    config = dataclasses.replace(load_model_config(model_dir), pad_token_id=7)
    assert shard_checkpoint(model_dir, out_dir, 2, resume=True, config=config).files == 0


def edited(**fields):
    return lambda text: json.dumps(json.loads(text) | fields)


DAMAGED_MANIFESTS = {
    "earlier format": (edited(format=1), "written by another version of nxdi-deepseek"),
    "half of it": (lambda text: text[: len(text) // 2], "cannot be read"),
    "empty": (lambda text: "", "cannot be read"),
    "a list": (lambda text: "[]", "cannot be read"),
    "nested deep": (lambda text: "[" * 5000, "cannot be read"),
    "no text": (lambda text: "\udc80", "cannot be read"),
    "tp_degree text": (edited(tp_degree="2"), "cannot be read (ValueError('wrong tp_degree"),
    "tp_degree huge": (edited(tp_degree=10**12), "wrong tp_degree"),
    "dtype": (edited(dtype=5), "wrong dtype"),
    "config": (edited(config=[]), "wrong config"),
    "checksums": (edited(xxh3_64={"tp0_sharded_checkpoint.safetensors": []}), "wrong xxh3_64"),
    "another file": (edited(xxh3_64={"tp-1_sharded_checkpoint.safetensors": {}}), "cannot be read"),
    "a rank too many": (edited(xxh3_64={"tp2_sharded_checkpoint.safetensors": {}}), "wrong rank"),
    "a field too many": (edited(more=1), "cannot be read"),
}


def one_line(capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", DAMAGED_MANIFESTS)
def test_damaged_manifest(model_dir, out_dir, tmp_path, capsys, name):
    damage, message = DAMAGED_MANIFESTS[name]
    path = out_dir / "weights" / MANIFEST
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    for arguments in (
        ["shard", str(model_dir), str(out_dir), "--tp-degree", "2", "--resume"],
        ["verify", str(model_dir), str(out_dir)],
        ["unshard", str(out_dir), str(tmp_path / "back")],
    ):
        error = one_line(capsys, arguments)
        assert f"{path}: " in error
        assert message in error
    assert not (tmp_path / "back").exists()


DAMAGED_JOURNALS = {
    "half a line in the middle": lambda lines: [lines[0], lines[1][:5], *lines[2:]],
    "half of the first line": lambda lines: [lines[0][:20], *lines[1:]],
    "empty": lambda lines: [],
    "nested deep": lambda lines: ["[" * 5000],
    "a unit that there is not": lambda lines: [lines[0], lines[1].replace("[", "[9999", 1)],
    "a negative unit": lambda lines: [lines[0], lines[1].replace("[", "[-1", 1)],
    "checksums of another number of ranks": lambda lines: [lines[0], json.dumps([3, "00" * 8])],
    "ranks that are none": lambda lines: [edited(ranks="01")(lines[0]), *lines[1:]],
    "first line that is no object": lambda lines: ["7", *lines[1:]],
}


@pytest.mark.parametrize("name", DAMAGED_JOURNALS)
def test_damaged_journal(model_dir, tmp_path, capsys, name):
    interrupted(model_dir, tmp_path / "out")
    path = tmp_path / "out/weights" / JOURNAL_FILE
    lines = DAMAGED_JOURNALS[name](path.read_text().splitlines())
    path.write_text("".join(line + "\n" for line in lines))
    error = one_line(capsys, ["shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "2", "--resume"])
    assert f"{path}: damaged (" in error
    assert "run without --resume to start over" in error
    assert main(["shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "2"]) == 0


def test_disk_space_for_all_parts_is_checked_first(model_dir, tmp_path, capsys, monkeypatch):
    """Room for the model alone is too little when the MTP layers are to be written too."""
    shard_checkpoint(model_dir, tmp_path / "alone", 2)
    size = sum(path.stat().st_size for path in (tmp_path / "alone/weights").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, size + 1))
    arguments = ["shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "2"]
    error = one_line(capsys, [*arguments, "--with-mtp"])
    assert "out/weights: disk full: " in error
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert main(arguments) == 0


def test_disk_space_for_unsharding_is_checked_first(out_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "back: disk full: " in one_line(capsys, ["unshard", str(out_dir), str(tmp_path / "back")])
    assert not list((tmp_path / "back").iterdir())


@pytest.mark.parametrize("damage", [lambda d: None, replace(NORM, lambda t: t / 0)], ids=["sound", "infinity"])
def test_descriptors_are_closed(model_dir, out_dir, tmp_path, capsys, damage):
    damage(model_dir)
    before = set(os.listdir("/proc/self/fd"))
    for arguments in (
        ["inspect", str(model_dir), "--full"],
        ["shard", str(model_dir), str(tmp_path / "again"), "--tp-degree", "2"],
        ["verify", str(model_dir), str(out_dir)],
        ["unshard", str(out_dir), str(tmp_path / "back")],
        ["shard", str(model_dir), str(tmp_path / "dry"), "--tp-degree", "2", "--dry-run"],
    ):
        main(arguments)
        assert set(os.listdir("/proc/self/fd")) == before, arguments[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shard", "--tp-degree", "0"], "tp_degree 0 must be at least 1"),
        (["shard", "--tp-degree", "-2"], "tp_degree -2 must be at least 1"),
        (["shard", "--tp-degree", "1000000000000"], "tp_degree 1000000000000 does not divide"),
        (["shard", "--tp-degree", "1000000000000", "--dry-run"], "tp_degree 1000000000000 does not divide"),
        (["shard", "--tp-degree", "2", "--ranks", "1-0"], "give numbers and ranges"),
        (["shard", "--tp-degree", "2", "--ranks", "0,1-0"], "give numbers and ranges"),
        (["shard", "--tp-degree", "2", "--ranks", ""], "give numbers and ranges"),
        (["shard", "--tp-degree", "2", "--ranks", "\u00b2"], "give numbers and ranges"),
        (["shard", "--tp-degree", "2", "--ranks", "0-99999999"], "not all in 0..1"),
        (["shard", "--tp-degree", "2", "--jobs", "-1"], "jobs -1 must be from 1 to 1024"),
        (["shard", "--tp-degree", "2", "--jobs", "0"], "jobs 0 must be from 1 to 1024"),
        (["shard", "--tp-degree", "2", "--jobs", "-1", "--dry-run"], "jobs -1 must be from 1 to 1024"),
        (["verify", "--sample", "2"], "--sample 2.0: give a share above 0"),
        (["verify", "--sample", "nan"], "--sample nan: give a share above 0"),
        (["verify", "--sample", "0"], "--sample 0.0: give a share above 0"),
        (["verify", "--jobs", "-1"], "jobs -1 must be from 1 to 1024"),
        (["unshard", "--jobs", "-1"], "jobs -1 must be from 1 to 1024"),
    ],
)
def test_values_that_cannot_be(model_dir, out_dir, tmp_path, capsys, arguments, message):
    command, *options = arguments
    folders = {"shard": [model_dir, tmp_path / "new"], "verify": [model_dir, out_dir]}
    folders = folders.get(command, [out_dir, tmp_path / "new"])
    assert message in one_line(capsys, [command, *map(str, folders), *options])
    assert not (tmp_path / "new").exists()
