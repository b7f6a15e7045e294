"""INT4 and FP8 as compressed-tensors writes them: read as that library reads them, into BF16 and into FP8."""

import json

import pytest
import torch
from nxdi_deepseek.checkpoint.convert import dequantized_state_dict, read_weight, state_dict_of
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from nxdi_deepseek.weight_forms import FORMS
from support.encodings import edit

pytest.importorskip("compressed_tensors")

from support.compressed import BF16_CONFIG, FORMATS, write_compressed  # noqa: E402
from support.fp8_experts import dequantized, largest_code, rank_file, rank_slice, whole_experts  # noqa: E402


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request, tmp_path_factory):
    """(folder, BF16 weights by the library)."""
    folder = tmp_path_factory.mktemp("compressed")
    return folder, write_compressed(folder, request.param)


def test_every_tensor_is_what_the_library_makes_of_it(checkpoint):
    folder, expected = checkpoint
    with Checkpoint(folder) as opened:
        actual = dequantized_state_dict(opened, torch.bfloat16)
        for name, tensor in actual.items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        name = "model.layers.2.mlp.experts.3.down_proj.weight"
        assert torch.equal(read_weight(opened.reader, name, opened.config, torch.bfloat16), expected[name])
        assert torch.equal(read_weight(opened.reader, name, opened.config, torch.bfloat16, (5, 9)), expected[name][5:9])


@pytest.mark.parametrize("tp_degree", [1, 4])
def test_rank_files_are_those_of_the_same_weights_in_bf16(checkpoint, tmp_path, tp_degree):
    folder, expected = checkpoint
    write_checkpoint(tmp_path / "plain", BF16_CONFIG)
    edit(tmp_path / "plain", lambda tensors: {name: expected[name] for name in tensors})
    shard_checkpoint(folder, tmp_path / "out", tp_degree, with_mtp=True)
    shard_checkpoint(tmp_path / "plain", tmp_path / "expected", tp_degree, with_mtp=True)
    for path in (tmp_path / "expected").rglob("*.safetensors"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "expected")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("weights", ["fp8", "fp8-block"])
def test_experts_in_fp8_are_those_weights_within_half_a_step(checkpoint, tmp_path, weights):
    folder, _ = checkpoint
    shard_checkpoint(folder, tmp_path, 4, weights=weights)
    with Checkpoint(folder) as opened:
        exact = whole_experts(dequantized_state_dict(opened), BF16_CONFIG, layer=2)
    layer = "layers.2.mlp.expert_mlps.mlp_op."
    for rank in range(4):
        tensors = rank_file(tmp_path, rank)
        assert largest_code(tensors) <= 0x77
        for values, name in zip(rank_slice(*exact, rank, 4), ("gate_up_proj", "down_proj"), strict=True):
            error = (dequantized(tensors, name, layer) - values).abs()
            scale = tensors[f"{layer}{name}.scale"].max()
            # 2^-4 of the value: half a step of three bits; among the smallest half of 2^-9 of the scale.
            assert (error <= torch.maximum(values.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()
    assert verify_shards(folder, tmp_path, sample=1.0).files == 4


def test_scales_per_channel_and_per_tensor_are_kept(tmp_path):
    """One scale for all weights of a cell: halved, not rounded anew."""
    for name in ("FP8 per tensor", "FP8 per channel"):
        folder = tmp_path / name.replace(" ", "")
        write_compressed(folder, name)
        errors = shard_checkpoint(folder, folder / "out", 4, weights="fp8").errors
        assert max(errors.values()) < 1e-3, name


def test_a_state_dict_of_any_form_is_of_the_same_weights(checkpoint):
    folder, expected = checkpoint
    with Checkpoint(folder) as opened:
        for form in FORMS.values():
            whole = state_dict_of(opened.reader, opened.config, torch.bfloat16, 4, form=form)
            assert whole["layers.1.mlp.router.linear_router.weight"].dtype == torch.bfloat16
            name = "layers.2.mlp.expert_mlps.mlp_op.gate_up_proj"
            gate_up, _ = whole_experts({k: v.float() for k, v in expected.items()}, BF16_CONFIG, layer=2)
            actual = whole[f"{name}.weight"].float()
            if form.is_fp8:
                actual = dequantized(
                    {f"{name}.{part}": whole[f"{name}.{part}"] for part in ("weight", "scale")}, "", name
                )
            assert (actual - gate_up).norm() <= 0.04 * gate_up.norm()


def test_inspect_names_the_format(checkpoint, capsys, request):
    folder, _ = checkpoint
    assert main(["inspect", str(folder), "--full"]) == 0
    printed = capsys.readouterr().out
    name = request.node.callspec.params["checkpoint"]
    told = {
        "INT4 in groups of 32": "INT4 in groups of 32, bfloat16 scales",
        "INT4 in groups of 16": "INT4 in groups of 16, float32 scales",
        "INT4 per channel": "INT4 with a scale per channel, bfloat16 scales",
        "FP8 per tensor": "FP8 (e4m3) with a scale per tensor, float32 scales",
        "FP8 per channel": "FP8 (e4m3) with a scale per channel, bfloat16 scales",
        "FP8 in blocks": "FP8 (e4m3) in blocks of 32x32, float32 scales",
    }
    assert f"quantization  {told[name]}\n" in printed
    parameters = sum(tensor.numel() for key, tensor in _model(folder).items() if "layers.3." not in key)
    assert f"parameters    {parameters / 1e6:.2f} million" in printed


def _model(folder):
    with Checkpoint(folder) as opened:
        return dequantized_state_dict(opened)


def test_damage_is_told(tmp_path, capsys):
    name = "model.layers.2.mlp.experts.3.down_proj."
    damages = {
        "weight_packed": (lambda t: t[:, :-1].clone(), "weight_packed: shape"),
        "weight_scale": (lambda t: t.to(torch.int32), "weight_scale: dtype torch.int32"),
        "weight_shape": (lambda t: t + 1, "weight_shape says"),
    }
    for part, (change, message) in damages.items():
        folder = tmp_path / part
        write_compressed(folder, "INT4 in groups of 32")
        edit(folder, lambda tensors: {k: change(t) if k == name + part else t for k, t in tensors.items()})  # noqa: B023
        assert main(["shard", str(folder), str(tmp_path / "out"), "--tp-degree", "2"]) == 2
        error = capsys.readouterr().err
        assert message in error and name in error and error.count("\n") == 1
    folder = tmp_path / "gone"
    write_compressed(folder, "INT4 in groups of 32")
    edit(folder, lambda tensors: {k: t for k, t in tensors.items() if k != name + "weight_scale"})
    assert main(["shard", str(folder), str(tmp_path / "out"), "--tp-degree", "2"]) == 2
    assert "without weight_scale beside it" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
