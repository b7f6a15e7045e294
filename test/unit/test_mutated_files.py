"""Hypothesis damages the files that a user brings: every command ends in success or one line, in bounded time."""

import contextlib
import io
import json
import shutil
import signal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nxdi_deepseek.checkpoint.sharder import JOURNAL_FILE
from nxdi_deepseek.cli import main
from support.models import V3

# Small enough for some hundred runs; FP8, so that the scales are damaged too.
FIELDS = V3 | {"num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 2, "num_nextn_predict_layers": 1}
FIELDS |= {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "vocab_size": 64}
FIELDS |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}, "torch_dtype": "bfloat16"}
SECONDS = 30  # for all commands on one damaged folder; a run takes one
RUNS = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

numbers = st.one_of(st.integers(-3, 200), st.sampled_from((10**6, 2**31, 2**64, 10**400)), st.floats())
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(("NaN", "40", "../x", "\0"))
)
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=4), scalars, max_size=2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sound checkpoint with generation_config.json, and its finished rank files."""
    from nxdi_deepseek.checkpoint.synthetic import write_checkpoint

    model_dir, out_dir = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("ranks")
    write_checkpoint(model_dir, FIELDS, shards=2)
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": True}))
    assert quietly("shard", model_dir, out_dir, "--tp-degree", 2) == 0
    return model_dir, out_dir


@pytest.fixture
def damaged(folders, tmp_path):
    """Makes a fresh copy of both folders for each example."""

    def copy():
        for source, name in zip(folders, ("model", "ranks"), strict=True):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(source, tmp_path / name)
        return tmp_path / "model", tmp_path / "ranks"

    return copy


def quietly(*arguments):
    """The exit status of a command, whose messages are checked: one line on stderr where it is 2."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            return stop.code
    if status == 2:
        assert errors.getvalue().startswith(f"nxdi-deepseek {arguments[0]}: "), errors.getvalue()
        assert errors.getvalue().count("\n") == 1, errors.getvalue()
    return status


@contextlib.contextmanager
def bounded(seconds=SECONDS):
    def stop(*_):
        raise TimeoutError(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_all(model_dir, out_dir, new_dir):
    """All commands that read a checkpoint. Where one refuses the checkpoint, no other accepts it."""
    with bounded():
        inspected = quietly("inspect", model_dir)
        shutil.rmtree(new_dir, ignore_errors=True)
        sharded = quietly("shard", model_dir, new_dir, "--tp-degree", 1)
        generated = quietly("generate", model_dir, "--prompt-ids", "5,6", "--max-new-tokens", 2, "--seq-len", 8)
        verified = quietly("verify", model_dir, out_dir)
    assert {inspected, sharded, generated, verified} <= {0, 1, 2}
    assert (inspected == 0) == (sharded == 0), "inspect and shard disagree"
    assert sharded == 0 or not list(new_dir.rglob("*.safetensors")), "half-written rank files"
    return inspected, generated


def mutate(value, path, new):
    """`value`, a JSON document, with what stands at `path` replaced by `new`, or removed for None."""
    if not path:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not keys:
        return new
    key = keys[path[0] % len(keys)]
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = mutate(value[key], path[1:], new)
    if new is None and len(path) == 1:
        del changed[key]
    return changed


def mutate_json(file, path, new):
    file.write_text(json.dumps(mutate(json.loads(file.read_text()), path, new)))


paths = st.lists(st.integers(0, 10**6), min_size=1, max_size=3)


@RUNS
@given(st.sampled_from(sorted(FIELDS)), values)
@example("rope_scaling", {"type": "yarn"})
@example("n_group", 0)
@example("num_nextn_predict_layers", None)
@example("num_hidden_layers", 1)
def test_config_json(damaged, field, new):
    model_dir, out_dir = damaged()
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {field: new}))
    run_all(model_dir, out_dir, model_dir.parent / "new")


@RUNS
@given(paths, values)
def test_index(damaged, path, new):
    model_dir, out_dir = damaged()
    mutate_json(model_dir / "model.safetensors.index.json", path, new)
    run_all(model_dir, out_dir, model_dir.parent / "new")


@RUNS
@given(st.integers(0, 1), paths, values)
def test_header_of_a_shard(damaged, shard, path, new):
    """The header is rewritten in its own length where that is enough room, so that the data stay in place."""
    model_dir, out_dir = damaged()
    file = sorted(model_dir.glob("*.safetensors"))[shard]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(mutate(json.loads(content[8 : 8 + length]), path, new), separators=(",", ":")).encode()
    header = header.ljust(length)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    run_all(model_dir, out_dir, model_dir.parent / "new")


FILES = ("config.json", "model.safetensors.index.json", "generation_config.json", "*00001-of-*.safetensors")


@RUNS
@given(st.sampled_from(FILES), st.floats(0, 1), st.binary(max_size=6), st.integers(0, 40))
@example("config.json", 0.0, b"", 10**6)
@example("*00001-of-*.safetensors", 0.0, b"version https://git-lfs", 10**6)
def test_bytes(damaged, name, place, new, removed):
    """Some bytes are replaced, or the file ends there."""
    model_dir, out_dir = damaged()
    file = next(iter(model_dir.glob(name)))
    content = file.read_bytes()
    start = int(place * len(content))
    file.write_bytes(content[:start] + new + content[start + removed :])
    run_all(model_dir, out_dir, model_dir.parent / "new")


@RUNS
@given(paths, values)
def test_generation_config(damaged, path, new):
    model_dir, _ = damaged()
    mutate_json(model_dir / "generation_config.json", path, new)
    with bounded():
        quietly("generate", model_dir, "--prompt-ids", "5,6", "--max-new-tokens", 2)


@RUNS
@given(paths, values)
def test_manifest(damaged, path, new):
    model_dir, out_dir = damaged()
    mutate_json(out_dir / "weights" / "manifest.json", path, new)
    with bounded():
        for command in (
            ("verify", model_dir, out_dir),
            ("unshard", out_dir, model_dir.parent / "unsharded"),
            ("shard", model_dir, out_dir, "--tp-degree", 2, "--resume"),
        ):
            shutil.rmtree(model_dir.parent / "unsharded", ignore_errors=True)
            assert quietly(*command) in (0, 1, 2)


@RUNS
@given(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 60))
def test_journal(damaged, place, new, removed):
    """Of a run that was stopped before its files got their names."""
    model_dir, out_dir = damaged()
    unfinish(model_dir, out_dir)
    journal = out_dir / "weights" / JOURNAL_FILE
    content = journal.read_bytes()
    start = int(place * len(content))
    journal.write_bytes(content[:start] + new + content[start + removed :])
    with bounded():
        assert quietly("shard", model_dir, out_dir, "--tp-degree", 2, "--resume") in (0, 2)


def unfinish(model_dir, out_dir):
    from nxdi_deepseek.checkpoint import sharder

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    shutil.rmtree(out_dir)
    with pytest.raises(Stop):
        sharder.shard_checkpoint(model_dir, out_dir, 2, progress=stop)


OPTIONS = {
    "shard": ("--tp-degree", "--ranks", "--jobs", "--dtype"),
    "verify": ("--sample", "--jobs"),
    "unshard": ("--jobs",),
    "generate": ("--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--seq-len", "--tp-degree"),
    "golden": ("--max-new-tokens", "--min-new-tokens", "--batch-size"),
}
texts = st.one_of(numbers.map(str), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6))


@RUNS
@given(st.sampled_from([(command, option) for command in OPTIONS for option in OPTIONS[command]]), texts)
@example(("shard", "--jobs"), "-1")
@example(("generate", "--top-k"), "-1")
@example(("generate", "--seed"), "-1")
@example(("generate", "--temperature"), "nan")
def test_command_lines(damaged, option, text):
    model_dir, out_dir = damaged()
    command, name = option
    new = model_dir.parent / "new"
    shutil.rmtree(new, ignore_errors=True)
    rest = {
        "shard": (model_dir, new, *(() if name == "--tp-degree" else ("--tp-degree", 2))),
        "verify": (model_dir, out_dir),
        "unshard": (out_dir, new),
        "generate": (
            model_dir,
            "--prompt-ids",
            "5,6",
            *(() if name == "--max-new-tokens" else ("--max-new-tokens", 2)),
        ),
        "golden": (
            model_dir,
            "--prompt-ids",
            "5,6",
            "--out",
            new,
            *(() if name == "--max-new-tokens" else ("--max-new-tokens", 1)),
        ),
    }[command]
    with bounded():
        assert quietly(command, *rest, f"{name}={text}") in (0, 1, 2)
