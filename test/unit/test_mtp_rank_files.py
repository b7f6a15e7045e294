"""Rank files of model and MTP draft: NxDI's names, the checkpoint's weights, and the way back."""

import json

import pytest
import torch
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.unsharder import unshard
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError
from nxdi_deepseek.rank_files import check_rank_files
from safetensors.torch import load_file
from support.damage import replace, with_config
from support.encodings import FP8_CONFIG
from support.models import load_config
from support.mtp_drafts import MTP_LAYER, write_drafted

TP = 2
FP8 = {name: FP8_CONFIG[name] for name in ("quantization_config", "torch_dtype")}


@pytest.fixture(params=["bf16", "fp8", "fp8-block"])
def written(request, tmp_path):
    """(checkpoint, rank files, weights)"""
    fields = {} if request.param == "bf16" else FP8
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    write_drafted(model_dir, None, hidden_size=128, moe_intermediate_size=128, intermediate_size=128, **fields)
    shard_checkpoint(model_dir, tmp_path / "out", TP, weights=request.param, fused=True)
    return model_dir, tmp_path / "out", request.param


def rank_file(folder, part="weights", rank=1):
    return load_file(folder / part / f"tp{rank}_sharded_checkpoint.safetensors")


def test_draft_and_model_lie_side_by_side(written, tmp_path):
    """With the bytes that the model has alone, and the MTP layer on its own; embedding and head are the model's."""
    model_dir, out, weights = written
    shard_checkpoint(model_dir, tmp_path / "parts", TP, weights=weights, with_mtp=True)
    model, mtp = (rank_file(tmp_path / "parts", part) for part in ("weights", "mtp/weights"))
    renamed = {"shared_head.norm": "layers.0.shared_head_norm", "enorm": "fc.enorm", "hnorm": "fc.hnorm"}
    renamed |= {"eh_proj": "fc.eh_proj", "embed_tokens": "embed_tokens", "shared_head.head": "lm_head"}
    expected = {f"target_model.{name}": tensor for name, tensor in model.items()}
    for name, tensor in mtp.items():
        own = name.removeprefix("layers.2.").removesuffix(".weight")
        place = f"{renamed[own]}.weight" if own in renamed else name.replace("layers.2.", "layers.0.")
        expected[f"draft_model.{place}"] = tensor
    found = rank_file(out)
    assert found.keys() == expected.keys()
    assert all(bits(found[name]).equal(bits(tensor)) for name, tensor in expected.items())


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def test_they_are_verified_and_become_the_checkpoint_again(written, tmp_path, capsys):
    model_dir, out, weights = written
    assert verify_shards(model_dir, out, sample=1).files == TP
    unshard(out, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    shard_checkpoint(tmp_path / "back", tmp_path / "again", TP, weights=weights, fused=True)
    if weights != "fp8":  # whose codes are rounded anew
        assert all(bits(rank_file(tmp_path / "again")[n]).equal(bits(t)) for n, t in rank_file(out).items())


def test_they_are_told_from_the_model_alone(written):
    model_dir, out, weights = written
    neuron = {"tp_degree": TP, "weights": weights, "torch_dtype": "bfloat16"}
    check_rank_files(out, load_config(model_dir, enable_eagle_speculation=True, **neuron), range(TP))
    with pytest.raises(CheckpointError, match="is missing"):
        check_rank_files(out, load_config(model_dir, **neuron), range(TP))
    with pytest.raises(CheckpointError, match="holds rank files of another part"):
        shard_checkpoint(model_dir, out, TP, weights=weights, resume=True)


def test_the_command_writes_them_and_refuses_others(tmp_path, capsys):
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    write_drafted(model_dir, "half")
    command = ["shard", str(model_dir), "--tp-degree", "2", "--speculation", "mtp"]
    assert main([*command[:2], str(tmp_path / "out"), *command[2:]]) == 0
    assert "draft_model.fc.eh_proj.weight" in rank_file(tmp_path / "out")
    assert main([*command[:2], str(tmp_path / "dry"), *command[2:], "--dry-run"]) == 0
    capsys.readouterr()
    replace(MTP_LAYER + "shared_head.head.weight", lambda tensor: tensor.flip(0))(model_dir)
    assert main([*command[:2], str(tmp_path / "other"), *command[2:]]) == 2
    assert "differs from lm_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with_config(num_nextn_predict_layers=0)(model_dir)
    assert main([*command[:2], str(tmp_path / "none"), *command[2:]]) == 2
    assert "num_nextn_predict_layers is 0" in capsys.readouterr().err
