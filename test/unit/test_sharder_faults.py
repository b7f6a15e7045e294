"""Sharding that is killed, starved of disk, disturbed: what is done stays usable, nothing half-written gets a name."""

import os
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from nxdi_deepseek.checkpoint import journal, planned_file, sharder
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.plan import make_plans
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_sparse_checkpoint
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError
from support import faults
from support.encodings import edit, write_encoded
from support.models import RELEASED

KILLS = 100
TP_DEGREE = 4


@pytest.fixture
def folder():
    """In memory where there is such a place: the tests wait for the disk at every step."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp("model"), "FP8, float32 scales")


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    """The content of every file of an undisturbed run."""
    out_dir = tmp_path_factory.mktemp("ranks")
    shard_checkpoint(checkpoint, out_dir, TP_DEGREE)
    return contents(out_dir)


def contents(out_dir):
    return {path.name: path.read_bytes() for path in (out_dir / "weights").iterdir()}


def assert_no_half_written(out_dir, expected):
    for name, content in contents(out_dir).items():
        if name.endswith(".safetensors"):
            assert content == expected[name], name


def test_killed_at_any_instant(checkpoint, expected, folder):
    """From the first unit on to beyond the last, each time some milliseconds into the next ones."""
    with Checkpoint(checkpoint) as opened:
        units = len(make_plans(opened, folder, TP_DEGREE, "bfloat16")[0].units)
    random_delay = random.Random(0)
    for i in range(KILLS):
        out_dir = folder / str(i)
        faults.kill_at(1 + i * units // KILLS, random_delay.uniform(0, 0.005), checkpoint, out_dir, TP_DEGREE)
        assert_no_half_written(out_dir, expected)
        shard_checkpoint(checkpoint, out_dir, TP_DEGREE, resume=True)
        assert contents(out_dir) == expected
        shutil.rmtree(out_dir)


def test_killed_again_and_again(checkpoint, expected, folder):
    """One run, killed at every unit: each start finishes a little more."""
    done = []

    def stop_after_one(done_bytes, _):
        done.append(done_bytes)
        raise KeyboardInterrupt

    for _ in range(1000):
        try:
            shard_checkpoint(checkpoint, folder, TP_DEGREE, jobs=1, resume=True, progress=stop_after_one)
            break
        except KeyboardInterrupt:
            assert_no_half_written(folder, expected)
    # The last call of the callback comes when the files have their names.
    assert done == sorted(done)
    assert len(done) > 20
    shard_checkpoint(checkpoint, folder, TP_DEGREE, resume=True)
    assert contents(folder) == expected


def test_killed_before_the_journal_is_whole(checkpoint, expected, folder, monkeypatch):
    def crash(value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal, "json", SimpleNamespace(dumps=crash))
        with pytest.raises(KeyboardInterrupt):
            shard_checkpoint(checkpoint, folder, TP_DEGREE)
    shard_checkpoint(checkpoint, folder, TP_DEGREE, resume=True)
    assert contents(folder) == expected


@pytest.mark.parametrize("crash_at", range(1, TP_DEGREE + 1))
def test_stopped_while_files_get_their_names(checkpoint, expected, folder, monkeypatch, crash_at):
    named = 0
    commit = planned_file.PlannedFile.commit

    def crashing(self):
        nonlocal named
        named += 1
        if named == crash_at:
            raise KeyboardInterrupt
        commit(self)

    monkeypatch.setattr(planned_file.PlannedFile, "commit", crashing)
    with pytest.raises(KeyboardInterrupt):
        shard_checkpoint(checkpoint, folder, TP_DEGREE)
    monkeypatch.undo()
    assert_no_half_written(folder, expected)
    assert shard_checkpoint(checkpoint, folder, TP_DEGREE, resume=True).files == TP_DEGREE - crash_at + 1
    assert contents(folder) == expected


def test_a_journal_line_cut_by_a_crash_is_ignored(checkpoint, expected, folder):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard_checkpoint(checkpoint, folder, TP_DEGREE, progress=stop)
    with (folder / "weights" / sharder.JOURNAL_FILE).open("a") as journal:
        journal.write('[3, "00')
    assert shard_checkpoint(checkpoint, folder, TP_DEGREE, resume=True).resumed > 0
    assert contents(folder) == expected


def test_disk_too_small_is_told_before_anything_is_written(checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert main(["shard", str(checkpoint), str(folder), "--tp-degree", "4"]) == 2
    error = capsys.readouterr().err
    assert "disk full" in error
    assert error.count("\n") == 1
    assert contents(folder) == {}


def test_disk_full_in_the_middle(checkpoint, expected, folder, monkeypatch):
    """Files of earlier runs stay as they are, and the run goes on when there is room."""
    shard_checkpoint(checkpoint, folder, TP_DEGREE, ranks=[0])
    left = 200_000

    def pwrite(descriptor, data, offset):
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, "No space left on device")
        return original(descriptor, data, offset)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match=r"partial: disk full; .* --resume"):
        shard_checkpoint(checkpoint, folder, TP_DEGREE, resume=True)
    monkeypatch.undo()
    assert_no_half_written(folder, expected)
    verify_shards(checkpoint, folder, sample=1.0)
    assert shard_checkpoint(checkpoint, folder, TP_DEGREE, resume=True).resumed > 0
    assert contents(folder) == expected


def test_a_file_the_system_refuses_to_grow(checkpoint, folder):
    receiver, sender = faults.pipe()
    process = faults.start(faults.shard_with_file_limit, checkpoint, folder, TP_DEGREE, 50_000, sender)
    kind, message = receiver.recv()
    process.join()
    assert kind == "CheckpointError"
    assert "cannot be written (File too large)" in message
    assert not list(folder.rglob("*.safetensors"))


def test_output_folder_that_cannot_be(checkpoint, folder, capsys):
    (folder / "file").write_text("")
    assert main(["shard", str(checkpoint), str(folder / "file/out"), "--tp-degree", "4"]) == 2
    error = capsys.readouterr().err
    assert "file/out/weights: cannot be created" in error
    assert error.count("\n") == 1


def test_output_folder_without_permission(checkpoint, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(CheckpointError, match="weights: not writable"):
        shard_checkpoint(checkpoint, folder, TP_DEGREE)


@pytest.mark.parametrize("damage", ["truncated", "rewritten"])
def test_source_that_changes_in_the_middle(folder, damage):
    model_dir = folder / "model"
    model_dir.mkdir()
    write_encoded(model_dir, "FP8, float32 scales")
    shard = model_dir / "model-00002-of-000003.safetensors"

    def change(done, _):
        if damage == "truncated":
            os.truncate(shard, 1000)
        else:
            os.utime(shard, ns=(0, done + 1))

    with pytest.raises(CheckpointError, match=r"model-00002-of-000003.safetensors.* (changed|cut short) while"):
        shard_checkpoint(model_dir, folder / "out", TP_DEGREE, jobs=1, progress=change)
    assert not list((folder / "out").rglob("*.safetensors"))
    if damage == "rewritten":
        # Only its time changed: the content is what the rank files are known by.
        shard_checkpoint(model_dir, folder / "out", TP_DEGREE, resume=True)
        verify_shards(model_dir, folder / "out", sample=1.0)


def test_nan_among_the_weights_names_the_tensor(folder):
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    model_dir = folder / "model"
    model_dir.mkdir()
    write_encoded(model_dir, "BF16")
    edit(model_dir, lambda tensors: {n: t.fill_(float("nan")) if n == name else t for n, t in tensors.items()})
    with pytest.raises(CheckpointError, match=f"safetensors: {name}: holds NaN"):
        shard_checkpoint(model_dir, folder / "out", TP_DEGREE)
    assert not list((folder / "out").rglob("*.safetensors"))


def test_two_runs_in_one_folder(checkpoint, expected, folder):
    receiver, sender = faults.pipe()
    process = faults.start(faults.shard_slowly, checkpoint, folder, TP_DEGREE, sender)
    assert receiver.recv() == "begun"
    with pytest.raises(CheckpointError, match="weights: another run is writing here"):
        shard_checkpoint(checkpoint, folder, TP_DEGREE)
    process.kill()
    process.join()
    shard_checkpoint(checkpoint, folder, TP_DEGREE, resume=True)
    assert contents(folder) == expected


def test_files_of_another_sharding_are_not_mixed(checkpoint, folder):
    shard_checkpoint(checkpoint, folder, TP_DEGREE, ranks=[0])
    with pytest.raises(CheckpointError, match="tp0_sharded_checkpoint.safetensors: exists; add --resume"):
        shard_checkpoint(checkpoint, folder, TP_DEGREE)
    for tp_degree, dtype in ((2, "bfloat16"), (TP_DEGREE, "float32")):
        with pytest.raises(CheckpointError, match="holds rank files of another"):
            shard_checkpoint(checkpoint, folder, tp_degree, dtype, ranks=[1], resume=True)


def test_memory_does_not_grow_with_the_experts(folder):
    """At the released sizes of an expert; holes cost neither disk nor memory."""
    peaks = []
    for experts in (16, 64):
        model_dir = folder / str(experts)
        model_dir.mkdir()
        write_sparse_checkpoint(model_dir, _one_layer(experts), shards=4)
        receiver, sender = faults.pipe()
        process = faults.start(faults.peak_memory, model_dir, folder / f"out{experts}", 64, [0], sender)
        peaks.append(receiver.recv())
        process.join()
    assert peaks[1] < 2 << 30
    assert peaks[1] - peaks[0] < 32 << 20


def _one_layer(experts):
    small = {"num_attention_heads": 64, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 32}
    small |= {"qk_nope_head_dim": 2, "v_head_dim": 2, "vocab_size": 64, "intermediate_size": 64}
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    return RELEASED | small | layers | {"n_routed_experts": experts}
