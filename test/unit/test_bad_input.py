"""A user's mistake gives one line that names the culprit, exit status 2 and no traceback."""

import json
import os
import subprocess
import sys

import pytest
import torch
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import DEMO_CONFIG
from safetensors.torch import load_file, save_file
from support.models import V3, Session, load_model, make_config, random_prompts

EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture
def model_dir(tmp_path):
    write_checkpoint(tmp_path, DEMO_CONFIG)
    return tmp_path


def shard_of(model_dir, name):
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    return model_dir / index["weight_map"][name]


def edit_tensors(model_dir, name, edit):
    """Rewrites the shard that holds `name`, with its index entries; edit changes the dict of its tensors."""
    path = shard_of(model_dir, name)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    index_path = model_dir / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    weight_map = {key: file for key, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = weight_map | dict.fromkeys(tensors, path.name)
    index_path.write_text(json.dumps(index))


def edit_config(model_dir, **fields):
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def remove_config(model_dir):
    (model_dir / "config.json").unlink()


def garble_config(model_dir):
    (model_dir / "config.json").write_text("{")


def drop(name):
    return lambda model_dir: edit_tensors(model_dir, name, lambda tensors: tensors.pop(name))


def replace(name, change):
    return lambda model_dir: edit_tensors(
        model_dir, name, lambda tensors: tensors.update({name: change(tensors[name])})
    )


def add_extra(model_dir):
    edit_tensors(model_dir, EXPERT, lambda tensors: tensors.update({"model.layers.1.mlp.extra": torch.zeros(1)}))


def orphan_scale(model_dir):
    name = "model.layers.1.mlp.other_proj.weight_scale_inv"
    edit_tensors(model_dir, EXPERT, lambda tensors: tensors.update({name: torch.zeros(1, 1)}))


def with_nan_code(weight):
    codes = weight.view(torch.uint8).clone()
    codes[0, 0] = 0x7F
    return codes.view(torch.float8_e4m3fn)


def remove_shard(model_dir):
    shard_of(model_dir, EXPERT).unlink()


def truncate_shard(model_dir):
    path = shard_of(model_dir, EXPERT)
    os.truncate(path, path.stat().st_size - 100)


NORM = "model.norm.weight"
DAMAGES = {
    "missing config": (remove_config, "config.json: no such file"),
    "unreadable config": (garble_config, "config.json: cannot be read as JSON"),
    "unknown model_type": (lambda d: edit_config(d, model_type="llama"), "model_type 'llama' is not supported"),
    "unknown topk_method": (lambda d: edit_config(d, topk_method="greedy"), "topk_method 'greedy' is not supported"),
    "softmax scores": (lambda d: edit_config(d, scoring_func="softmax"), "scoring_func 'softmax' is not supported"),
    "missing field": (lambda d: edit_config(d, kv_lora_rank=None), "config.json: missing kv_lora_rank"),
    "linear rope": (
        lambda d: edit_config(d, rope_scaling={"type": "linear", "factor": 2}),
        "rope_scaling: type is linear",
    ),
    "unknown yarn field": (
        lambda d: edit_config(d, rope_scaling=DEMO_CONFIG["rope_scaling"] | {"truncate": False}),
        "truncate False is not supported",
    ),
    "groups": (lambda d: edit_config(d, n_group=3), "n_group 3 does not divide 16 experts"),
    "too many experts per token": (lambda d: edit_config(d, num_experts_per_tok=9), "num_experts_per_tok 9 is not in"),
    "missing tensor": (drop(NORM), f"{NORM}: missing"),
    "missing expert": (drop(EXPERT), f"{EXPERT}: missing"),
    "extra tensor": (add_extra, "model.layers.1.mlp.extra: not a tensor of this model"),
    "misshapen tensor": (replace(NORM, lambda t: t[:-1].clone()), f"{NORM}: shape [191], expected [192]"),
    "no scale": (drop(EXPERT + "_scale_inv"), f"{EXPERT}: FP8 weight without its block scales (_scale_inv)"),
    "orphan scale": (orphan_scale, "model.layers.1.mlp.other_proj.weight_scale_inv: a scale without its weight"),
    "NaN in FP8": (replace(EXPERT, with_nan_code), f"{EXPERT}: holds NaN"),
    "NaN in BF16": (replace(NORM, lambda t: t.fill_(float("nan"))), f"{NORM}: holds NaN"),
    "missing shard": (remove_shard, "named by model.safetensors.index.json but missing"),
    "truncated shard": (truncate_shard, "not a complete safetensors file"),
}


def run_generate(capsys, model_dir, *arguments):
    """stderr of a `generate` that fails."""
    arguments = arguments or ("--prompt-ids", "5,6")
    assert main(["generate", str(model_dir), "--max-new-tokens", "4", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint(capsys, model_dir, name):
    damage, message = DAMAGES[name]
    damage(model_dir)
    assert message in run_generate(capsys, model_dir)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt-ids", "1,2,3", "--seq-len", "6"], "need 7 positions, --seq-len is 6"),
        (["--prompt-ids", ""], "prompt 0 is empty"),
        (["--prompt-ids", "5", "--prompt-ids", ","], "prompt 1 is empty"),
        (["--prompt-ids", "five"], "--prompt-ids takes integers"),
        (["--prompt-ids", "5,512"], "token id 512 is outside the vocabulary of 512"),
        (["--prompt", "hello"], "has no tokenizer; give token ids with --prompt-ids"),
        (["--prompt-ids", "5", "--tp-degree", "3"], "tp_degree 3 does not divide intermediate_size 320"),
        (["--prompt-ids", "5", "--tp-degree", "2"], "start with torchrun --nproc-per-node 2"),
    ],
)
def test_bad_arguments(capsys, model_dir, arguments, message):
    assert message in run_generate(capsys, model_dir, *arguments)


def test_experts_that_the_tp_degree_does_not_divide_are_named():
    with pytest.raises(ConfigError, match="tp_degree 8 does not divide .*moe_intermediate_size 36"):
        make_config(V3 | {"moe_intermediate_size": 36}, tp_degree=8)


@pytest.mark.parametrize("field, value", [("quantization_config", {"weight_block_size": [0, 128]})])
def test_block_size_must_be_positive(capsys, model_dir, field, value):
    edit_config(model_dir, **{field: value})
    assert "weight_block_size" in run_generate(capsys, model_dir)


def test_running_out_of_positions_and_slots(tmp_path):
    write_checkpoint(tmp_path, V3)
    model = load_model(tmp_path, batch_size=1, seq_len=8, max_context_length=6)
    session = Session(model)
    with pytest.raises(ConfigError, match="prompt of 7 tokens exceeds max_context_length 6"):
        session.prefill(random_prompts((7,)))
    with pytest.raises(ConfigError, match="batch of 2 sequences exceeds batch_size 1"):
        session.prefill(random_prompts((2, 2)))
    with pytest.raises(ConfigError, match="slot 1 of 1"):
        session.prefill(random_prompts((2,)), slots=[1])
    session.prefill(random_prompts((6,)))
    session.decode([3])
    session.decode([3])
    with pytest.raises(ConfigError, match="the sequence reached seq_len 8"):
        session.decode([3])


def test_nxdi_that_is_too_old_is_one_line(tmp_path):
    """An NxDI that lacks a name which this model imports."""
    for package in ("neuronx_distributed", "neuronx_distributed_inference"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    environment = {k: v for k, v in os.environ.items() if k != "NXDI_DEEPSEEK_BACKEND"}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-m", "nxdi_deepseek.cli", "generate", "nowhere", "--prompt-ids", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "install the Neuron SDK 2.29 or newer" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", ""),
        ("shard", "", "out", "--tp-degree", "2"),
        ("shard", "model", "", "--tp-degree", "2"),
        ("verify", "model", ""),
        ("unshard", "", "model"),
        ("unshard", "out", ""),
        ("golden", "model", "--prompt-ids", "5", "--out", ""),
        ("generate", "", "--prompt-ids", "5"),
        ("compare", "", "model"),
        ("compare", "golden", ""),
        ("compare", "golden", "model", "--out", ""),
        ("compare", "golden", "model", "--gates", ""),
    ],
    ids=" ".join,
)
def test_an_empty_file_name(tmp_path, monkeypatch, capsys, arguments):
    """It would be the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'' is not the name of a file or folder" in error
    assert list(tmp_path.iterdir()) == []
