"""Kimi-K2.5 as released: names behind a prefix, vision tensors, experts in INT4, a config within a config.

And the experts of Mistral-Small-4: all of a layer in one FP8 tensor, with a scale for each expert.
"""

import json

import pytest
import torch
from nxdi_deepseek.checkpoint.convert import dequantized_state_dict
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.checkpoint.unsharder import unshard
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from safetensors.torch import load_file, save_file
from support.encodings import edit
from support.members import KIMI, write_member

pytest.importorskip("compressed_tensors")

from support.compressed import write_compressed  # noqa: E402

TEXT = KIMI["text_config"] | {"moe_intermediate_size": 96, "torch_dtype": "bfloat16"}  # whole groups of 32
VISION = {"vision_tower.encoder.blocks.0.norm0.weight": torch.ones(16), "mm_projector.proj.0.weight": torch.ones(4, 4)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module", params=["in text_config", "outside"])
def released(request, plain, tmp_path_factory):
    """The release; beside it, in `plain`, the text model alone with BF16 weights."""
    folder = tmp_path_factory.mktemp("released")
    weights = write_compressed(folder, "INT4 in groups of 32", TEXT)
    write_checkpoint(plain, TEXT)
    edit(plain, lambda tensors: {name: weights[name] for name in tensors})
    edit(folder, lambda tensors: {f"language_model.{name}": tensor for name, tensor in tensors.items()})
    edit(folder, lambda tensors: tensors | VISION, file="model-00001*")
    text = json.loads((folder / "config.json").read_text())
    fields = KIMI | {"text_config": text}
    if request.param == "outside":
        fields["quantization_config"] = text.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_inspect_says_complete(released, capsys):
    assert main(["inspect", str(released), "--full"]) == 0
    said = capsys.readouterr().out
    assert "complete" in said
    assert "INT4 in groups of 32, bfloat16 scales" in said
    assert "vision: only the text model runs (2 tensors)" in said


@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp8-block"])
def test_shard_and_unshard_give_the_text_model(released, plain, tmp_path, weights):
    shard_checkpoint(released, tmp_path / "ranks", 2, weights=weights)
    verify_shards(released, tmp_path / "ranks", sample=1.0)
    unshard(tmp_path / "ranks", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == TEXT["model_type"]
    with Checkpoint(tmp_path / "back") as back, Checkpoint(plain) as expected:
        actual, expected = (dequantized_state_dict(opened) for opened in (back, expected))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if weights == "bf16" or ".mlp.experts." not in name:
            assert torch.equal(actual[name], tensor), name
        else:
            assert (actual[name] - tensor).norm() <= 0.04 * tensor.norm(), name


@pytest.mark.parametrize("shape", [(-1, 1, 1), (-1,)], ids=["E, 1, 1", "E"])
def test_fused_experts_in_fp8(tmp_path, capsys, shape):
    """Each expert's codes times its own scale; gate and up share one. What scales activations is not used."""
    write_member(tmp_path, "Mistral-Small-4", seed=0)
    path = tmp_path / "model.safetensors"
    tensors, expected = load_file(path), {}
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        scale = (tensors[name].abs().amax((1, 2)) / 448).bfloat16()
        codes = (tensors[name] / scale.float()[:, None, None]).to(torch.float8_e4m3fn)
        expected[name] = codes.float() * scale.float()[:, None, None]
        tensors |= {name: codes, f"{name}_scale_inv": scale.reshape(shape).clone()}
        tensors[f"{name}_activation_scale"] = torch.ones_like(scale)
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["inspect", str(tmp_path), "--full"]) == 0
    said = capsys.readouterr().out
    assert "complete" in said and "bfloat16 scales" in said
    with Checkpoint(tmp_path) as opened:
        actual = dequantized_state_dict(opened)
    for name, experts in expected.items():
        prefix, _, fused = name.removeprefix("language_model.").rpartition(".")
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for expert, values in enumerate(experts):
            own = torch.cat([actual[f"{prefix}.{expert}.{part}.weight"] for part in parts])
            assert torch.equal(own, values), name
