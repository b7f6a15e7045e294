"""Golden outputs against transformers' whole model, and what a killed run leaves."""

import importlib
import json
import os
import shutil
import signal

import pytest
import torch
from nxdi_deepseek.accuracy.golden_run import RunState, Sequence, make_golden, space_needed
from nxdi_deepseek.accuracy.oracle import LayerOracle
from nxdi_deepseek.accuracy.recording import Entry, Rule, load_recording
from nxdi_deepseek.accuracy.reference import hugging_face_model, reference_logits
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.synthetic import fill_rows, write_checkpoint, write_sparse_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.example_configs import DEMO_CONFIG
from nxdi_deepseek.routing import select_experts
from nxdi_deepseek.tiny_model import TINY_MODEL_DIR
from support.memory import peak_memory_growth
from support.models import CONFIGS, random_prompts

# float32 against float32. Two evaluations that sum n terms in different orders differ by about sqrt(n) * 2^-24 of the
# largest value; n is the terms on the way to a logit (3 layers of some 3000), logits reach 6: 3.4e-5. Three times that.
TOLERANCE = 1e-4
NEW_TOKENS = 6

FP8 = {"quantization_config": DEMO_CONFIG["quantization_config"], "vocab_size": 256}
NAMES = ("v3", "no q_lora (Moonlight)", "tied embeddings")


def ids(tokens):
    return ",".join(map(str, tokens))


def command_for(model_dir, out, *arguments, prompts=((5, 17, 42, 9), (7, 8))):
    prompt_arguments = [word for prompt in prompts for word in ("--prompt-ids", ids(prompt))]
    return ["golden", str(model_dir), *prompt_arguments, "--out", str(out), *arguments]


def golden(*arguments, **prompts):
    return main(command_for(*arguments, **prompts))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, CONFIGS["v3"] | FP8 | {"eos_token_id": None})
    return path


@pytest.fixture(scope="module")
def made(model_dir, tmp_path_factory):
    """A finished run with traces."""
    out = tmp_path_factory.mktemp("golden") / "out"
    assert golden(model_dir, out, "--max-new-tokens", str(NEW_TOKENS), "--trace") == 0
    return out


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_whole_model_on_dequantized_weights(name, tmp_path):
    write_checkpoint(tmp_path / "model", CONFIGS[name] | FP8, seed=3)
    prompts = random_prompts((9, 1, 14))
    arguments = ("--max-new-tokens", str(NEW_TOKENS), "--min-new-tokens", str(NEW_TOKENS))
    assert golden(tmp_path / "model", tmp_path / "out", *arguments, prompts=prompts) == 0
    recording = load_recording(tmp_path / "out")
    model = hugging_face_model(tmp_path / "model")
    for prompt, entry, logits in zip(prompts, recording.entries, recording.logits, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=1,
        )
        assert prompt + entry.tokens == expected[0].tolist()
        expected_logits = reference_logits(model, prompt + entry.tokens)[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=TOLERANCE)


def run_until_killed(command, writes):
    """In a fork of this process that is killed in the middle of its write number `writes`. True if it was."""
    process = os.fork()
    if process == 0:
        replace, left = os.replace, [writes]

        def replace_or_die(*paths):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = replace_or_die
        main(command)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def test_killed_and_resumed_gives_the_same_bytes(model_dir, made, tmp_path):
    """Killed again and again until it is done, in passes, in the trace and while it writes the results."""
    command = command_for(model_dir, tmp_path / "out", "--max-new-tokens", str(NEW_TOKENS), "--trace")
    assert run_until_killed(command, writes=7)
    while run_until_killed(command, writes=7):  # the last steps need 6
        assert not (tmp_path / "out" / "recording.json").exists()
    assert files(tmp_path / "out") == files(made)


def test_killed_after_the_last_write(model_dir, made, tmp_path):
    arguments = ("--max-new-tokens", str(NEW_TOKENS), "--trace")
    shutil.copytree(made, tmp_path / "out")
    assert run_until_killed(command_for(model_dir, tmp_path / "other", *arguments), writes=3)
    shutil.copytree(tmp_path / "other" / "unfinished", tmp_path / "out" / "unfinished")
    assert golden(model_dir, tmp_path / "out", *arguments) == 0
    assert files(tmp_path / "out") == files(made)


def test_bfloat16_is_as_close_to_float32_as_its_digits(tmp_path):
    """On the trained model, through compare, up to the first token that differs."""
    prompts = ["It was a dark night, and the", "She opened the letter"]
    command = ["golden", str(TINY_MODEL_DIR), "--max-new-tokens", "16", *(w for p in prompts for w in ("--prompt", p))]
    assert main([*command, "--out", str(tmp_path / "float32")]) == 0
    assert main([*command, "--dtype", "bfloat16", "--out", str(tmp_path / "bfloat16")]) == 0
    gates = tmp_path / "gates.json"
    gates.write_text('{"top5_agreement": 1.0, "kl_mean": 0.01, "pearson": 0.999}')
    assert main(["compare", str(tmp_path / "float32"), str(tmp_path / "bfloat16"), "--gates", str(gates)]) == 0


def test_memory_does_not_hold_a_layer(tmp_path):
    """4 expert layers of 32 experts are 1.6 GB in float32, a layer's experts 400 MB. One expert (12 MB), the largest
    matrix of attention, a piece of the head (34 MB) and what is copied on the way fit in 120 MB."""
    tokens = list(range(2, 18))
    fields = CONFIGS["v3"] | FP8 | {"hidden_size": 1024, "moe_intermediate_size": 1024, "vocab_size": 32768}
    fields |= {"num_hidden_layers": 5, "n_routed_experts": 32, "n_group": 1, "topk_group": 1}
    write_sparse_checkpoint(tmp_path, fields, shards=4)
    generator = torch.Generator().manual_seed(0)
    fill_rows(tmp_path, "model.embed_tokens.weight", 18, generator)
    for layer in range(1, 5):  # so that the tokens choose many experts
        fill_rows(tmp_path, f"model.layers.{layer}.mlp.gate.weight", 32, generator)
    importlib.import_module("support.warm_kernels")  # else the compiler counts as the memory of the run
    grown = peak_memory_growth(golden, tmp_path, tmp_path / "out", "--max-new-tokens", "1", prompts=[tokens])
    assert load_recording(tmp_path / "out").entries[0].tokens
    assert 0 < grown < 120e6


def test_a_draft_saves_passes_and_changes_no_token(model_dir, made, tmp_path, capsys):
    recording = load_recording(made)
    first, second = (entry.tokens for entry in recording.entries)
    wrong = [*second[:2], (second[2] + 1) % 256, *second[3:]]
    arguments = ["--max-new-tokens", str(NEW_TOKENS), "--continuation", ids(first), "--continuation", ids(wrong)]
    assert golden(model_dir, tmp_path / "out", *arguments) == 0
    drafted = load_recording(tmp_path / "out")
    assert [entry.tokens for entry in drafted.entries] == [first, second]
    for logits, expected in zip(drafted.logits, recording.logits, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert "pass 2" in (stderr := capsys.readouterr().err)
    assert "pass 3" not in stderr  # one pass for the draft that holds, two for the one with a wrong token


def test_draft_holds_up_to_the_first_other_choice():
    def logits(*tokens):
        return torch.nn.functional.one_hot(torch.tensor(tokens), 10).float()

    sequence = Sequence([1, 2], draft=[3, 4, 9, 6])
    rule = Rule(max_new_tokens=8)
    assert sequence.new_tokens(rule) == [1, 2, 3, 4, 9, 6]
    assert sequence.advance(logits(3, 4, 5, 0, 0), rule) == 3
    assert (sequence.tokens, sequence.draft, sequence.cached) == ([3, 4, 5], [6], 4)
    assert sequence.new_tokens(rule) == [5, 6]
    assert sequence.advance(logits(6, 7), rule) == 2
    assert (sequence.tokens, sequence.draft, sequence.cached) == ([3, 4, 5, 6, 7], [], 6)


def test_stop_token_ends_but_not_too_early():
    rule = Rule(max_new_tokens=5, stop_tokens=(1,), min_new_tokens=2)
    scores = torch.tensor([0.0, 2.0, 1.0])
    assert [rule.choose(scores, step) for step in range(3)] == [2, 2, 1]
    assert rule.is_done([2, 2, 1])
    assert not rule.is_done([2, 2])


def test_expected_outputs_load_safely_in_the_form_of_generate(model_dir, made):
    recording = load_recording(made)
    outputs = torch.load(made / "expected_outputs_1.pt", weights_only=True)
    model = hugging_face_model(model_dir)
    expected = model.generate(
        torch.tensor([[7, 8]]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(outputs.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(outputs.scores), torch.stack(expected.scores), rtol=0, atol=TOLERANCE)
    assert outputs.sequences[0, 2:].tolist() == recording.entries[1].tokens


def test_negative_biases_choose_as_the_release_does(tmp_path, monkeypatch):
    """transformers 4 rules experts out with 0, which beats a negative score; the oracle must not follow it."""
    write_checkpoint(tmp_path, CONFIGS["v3"])
    generator = torch.Generator().manual_seed(0)
    bias = -1 - torch.rand(16, generator=generator)
    tokens = torch.randn(40, 96, generator=generator)
    with Checkpoint(tmp_path) as checkpoint:
        oracle = LayerOracle(checkpoint)
        get = oracle.weights.get
        monkeypatch.setattr(oracle.weights, "get", lambda name: bias if name.endswith("bias") else get(name))
        index, _, scores = oracle._route("model.layers.1.mlp.gate.", tokens)
    ours = select_experts(scores - bias, bias, 4, 4, 2)
    assert torch.equal(index.sort(-1).values, ours.sort(-1).values)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_every_file_is_closed(model_dir, tmp_path):
    """One descriptor per shard and one for the lock while it runs, in every layer of every pass; none afterwards."""
    before, during = open_files(), []
    prompts = [Entry(None, [5, 17, 42, 9]), Entry(None, [7, 8])]
    with Checkpoint(model_dir) as checkpoint:
        make_golden(
            checkpoint, prompts, [[], []], Rule(3), tmp_path, trace=True, report=lambda _: during.append(open_files())
        )
        shards = len(checkpoint.reader.files)
    assert len(during) > 4 * checkpoint.config.num_hidden_layers
    assert max(during) <= before + shards + 1
    assert open_files() == before


def test_files_are_on_the_disk_before_the_json_that_names_them(model_dir, tmp_path, monkeypatch):
    """A file appears under its name with synced content, and each JSON only when all other names are synced too."""
    synced, unsynced_folders, named = set(), set(), []
    fsync, replace = os.fsync, os.replace

    def spy_on_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_ino, status.st_mtime_ns))
        unsynced_folders.discard(status.st_ino)

    def spy_on_replace(source, target):
        status = os.stat(source)
        assert (status.st_ino, status.st_mtime_ns) in synced, target
        if str(target).endswith(".json"):
            assert not unsynced_folders, target
        replace(source, target)
        unsynced_folders.add(os.stat(os.path.dirname(target)).st_ino)
        named.append(os.path.basename(target))

    monkeypatch.setattr(os, "fsync", spy_on_fsync)
    monkeypatch.setattr(os, "replace", spy_on_replace)
    assert golden(model_dir, tmp_path / "out", "--max-new-tokens", "2", "--trace") == 0
    assert not unsynced_folders
    assert named[-1] == "recording.json"
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} <= set(named)


@pytest.mark.parametrize("name", NAMES)
def test_estimate_of_space_is_what_is_written(name, tmp_path, monkeypatch):
    """Seen when all is there, before the unfinished run is removed."""
    write_checkpoint(tmp_path / "model", CONFIGS[name] | FP8 | {"eos_token_id": None})
    monkeypatch.setattr(RunState, "remove", lambda state: None)
    prompts = [Entry(None, prompt) for prompt in random_prompts((40, 25))]
    with Checkpoint(tmp_path / "model") as checkpoint:
        make_golden(checkpoint, prompts, [[], []], Rule(3), tmp_path / "out", trace=True)
        needed = space_needed(LayerOracle(checkpoint), prompts, 3, trace=True)
    written = sum(len(content) for content in files(tmp_path / "out").values())
    assert 0.85 * needed < written < needed  # the rest is for files that are written beside the ones they replace


def test_a_full_disk_is_told_before_the_first_byte(model_dir, made, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    command = ("--max-new-tokens", str(NEW_TOKENS), "--trace")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
        assert golden(model_dir, tmp_path / "new" / "out", *command) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "golden outputs need" in message and "are free" in message
        assert not (tmp_path / "new").exists()
    assert run_until_killed(command_for(model_dir, tmp_path / "out", *command), writes=20)
    there = sum(map(len, files(tmp_path / "out").values()))
    with Checkpoint(model_dir) as checkpoint:
        prompts = [Entry(None, [5, 17, 42, 9]), Entry(None, [7, 8])]
        needed = space_needed(LayerOracle(checkpoint), prompts, NEW_TOKENS, trace=True)
    # What is there already needs no room again.
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - there))
    assert golden(model_dir, tmp_path / "out", *command) == 0
    assert files(tmp_path / "out") == files(made)


@pytest.mark.parametrize(
    "damaged", ["request.json", "progress.json", "hidden.safetensors", "cache/layers.0.safetensors"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0" * 40])
def test_a_damaged_unfinished_run_is_one_line(model_dir, tmp_path, capsys, damaged, content):
    command = command_for(model_dir, tmp_path / "out", "--max-new-tokens", "4")
    assert run_until_killed(command, writes=14)  # in the second pass
    (tmp_path / "out" / "unfinished" / damaged).write_bytes(content)
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert damaged in message or "unfinished run of another model" in message
    assert "unfinished" in message and "delete" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--min-new-tokens", "-1"], "--min-new-tokens -1 must be at least 0"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--batch-size", str(10**20)], "must be at most 2147483647"),
        (["--max-new-tokens", "2147483647"], "golden outputs need"),
        (["--continuation", "1", "--continuation", "2", "--continuation", "3"], "3 --continuation for 2 prompts"),
        (["--continuation", "999"], "token id 999 is outside the vocabulary of 256"),
    ],
)
def test_bad_arguments_are_one_line(model_dir, tmp_path, capsys, arguments, message):
    assert golden(model_dir, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_are_one_line(model_dir, tmp_path, capsys):
    assert golden(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere/config.json: no such file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert golden(model_dir, tmp_path / "file") == 2
    assert "file: cannot be created" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(model_dir, made, tmp_path, capsys):
    assert golden(model_dir, made, "--max-new-tokens", "2") == 2
    assert "holds finished outputs" in capsys.readouterr().err
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "request.json").write_text("{}")
    assert golden(model_dir, tmp_path) == 2
    assert "an unfinished run of another model" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.2}, {"suppress_tokens": [3]}, {"no_repeat_ngram_size": 2}])
def test_a_generation_config_that_changes_greedy_tokens_is_refused(model_dir, tmp_path, capsys, fields):
    """`generate` follows it, and golden outputs would differ from a model that is right."""
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(fields))
    assert golden(tmp_path / "model", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"generation_config.json: {next(iter(fields))}=" in error
    assert not (tmp_path / "out").exists()


def test_a_generation_config_for_sampling_is_taken(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    released = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.0, "eos_token_id": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(released))
    assert golden(tmp_path / "model", tmp_path / "out", "--max-new-tokens", "1", prompts=[(5, 6)]) == 0
