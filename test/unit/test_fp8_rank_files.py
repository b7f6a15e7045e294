"""Rank files with experts in FP8 at all doors: sizes, resume, verify, unshard, and loading by another config."""

import json
from types import SimpleNamespace

import pytest
import torch
from nxdi_deepseek.checkpoint import sharder
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.plan import ShardPlan
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_sparse_checkpoint
from nxdi_deepseek.checkpoint.unsharder import unshard
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError, ConfigError
from nxdi_deepseek.example_configs import RELEASED_CONFIG
from nxdi_deepseek.model_config import load_model_config
from nxdi_deepseek.rank_files import check_rank_files
from nxdi_deepseek.weight_forms import FORMS
from safetensors.torch import load_file, save_file
from support.encodings import FP8_CONFIG, edit, write_encoded
from support.fp8_experts import dequantized, rank_file, stored_tensors
from support.memory import peak_memory_growth

FP8_FORMS = [name for name, form in FORMS.items() if form.is_fp8]
CONFIG = FP8_CONFIG | {"moe_intermediate_size": 64}
EXPERT = "model.layers.2.mlp.experts.3."
SCALE = "layers.2.mlp.expert_mlps.mlp_op.down_proj.scale"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp("model"), "FP8, float32 scales", CONFIG)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("weights", FORMS)
def test_dry_run_knows_the_sizes_to_the_byte(model_dir, tmp_path, capsys, weights):
    arguments = ["shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "4", "--weights", weights]
    with Checkpoint(model_dir) as checkpoint:
        plan = ShardPlan(checkpoint.config, 4, torch.bfloat16, tmp_path / "out", form=FORMS[weights])
    assert main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert {len(data) for data in contents(tmp_path / "out").values()} == {plan.file_bytes}
    assert printed.count("error of FP8  layers.") == (0 if weights == "bf16" else 2)


@pytest.mark.parametrize("weights", FP8_FORMS)
def test_a_stopped_run_goes_on_to_the_same_bytes_and_errors(model_dir, tmp_path, monkeypatch, weights):
    shard_checkpoint(model_dir, tmp_path / "whole", 4, weights=weights, with_mtp=True)
    monkeypatch.setattr(sharder, "SYNC_SECONDS", 0)

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        shard_checkpoint(model_dir, tmp_path / "out", 4, weights=weights, with_mtp=True, jobs=1, progress=stop)
    other = next(name for name in FORMS if name != weights)
    with pytest.raises(CheckpointError, match="had another weights|holds rank files of another weights"):
        shard_checkpoint(model_dir, tmp_path / "out", 4, weights=other, with_mtp=True, resume=True)
    assert shard_checkpoint(model_dir, tmp_path / "out", 4, weights=weights, with_mtp=True, resume=True).resumed > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for part in ("weights", "mtp/weights"):
        manifests = [json.loads((tmp_path / out / part / "manifest.json").read_text()) for out in ("out", "whole")]
        assert manifests[0] == manifests[1]
        assert manifests[0]["fp8_errors"]
    assert verify_shards(model_dir, tmp_path / "out", sample=1.0).files == 8


@pytest.mark.parametrize("weights", FP8_FORMS)
@pytest.mark.parametrize("part", ["weight", "scale"])
def test_verify_names_a_damaged_tensor(model_dir, tmp_path, weights, part):
    shard_checkpoint(model_dir, tmp_path, 2, weights=weights)
    path = tmp_path / "weights/tp1_sharded_checkpoint.safetensors"
    tensors = load_file(path)
    name = SCALE.replace("scale", part)
    tensors[name].view(torch.uint8)[3, 0, 5] ^= 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name) as caught:
        verify_shards(model_dir, tmp_path, sample=1.0)
    assert SCALE.replace("down_proj.scale", "gate_up") not in str(caught.value)


@pytest.mark.parametrize("tp_degree", [1, 4])
def test_unsharding_fp8_block_gives_the_codes_of_the_checkpoint_but_the_sixteen(model_dir, tmp_path, tp_degree):
    shard_checkpoint(model_dir, tmp_path / "out", tp_degree, weights="fp8-block", with_mtp=True)
    unshard(tmp_path / "out", tmp_path / "back")
    stored, back = stored_tensors(model_dir), stored_tensors(tmp_path / "back")
    known = torch.tensor([*range(0x01, 0x10, 2), *range(0x81, 0x90, 2)], dtype=torch.uint8)
    experts = [name for name in stored if ".experts." in name]
    for name in experts:
        if name.endswith("_scale_inv"):
            assert torch.equal(back[name], stored[name]), name
            continue
        codes, again = stored[name].view(torch.uint8), back[name].view(torch.uint8)
        differ = codes != again
        assert torch.isin(codes[differ], known).all()
        assert not torch.isin(codes[~differ], known).any()
    assert any(name.startswith("model.layers.3.") for name in experts)
    assert all(back[name].dtype == torch.bfloat16 for name in back if "self_attn" in name)
    fields = json.loads((tmp_path / "back/config.json").read_text())
    assert fields["quantization_config"]["weight_block_size"] == [32, 32]
    assert main(["inspect", str(tmp_path / "back")]) == 0
    shard_checkpoint(tmp_path / "back", tmp_path / "again", tp_degree, weights="fp8-block", with_mtp=True)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_unsharding_blocks_that_were_made_here_keeps_their_values(tmp_path):
    """From BF16: no block of a checkpoint to go back to, and codes of 240, which have no double."""
    write_encoded(tmp_path / "model", "BF16", CONFIG)
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 4, weights="fp8-block", with_mtp=True)
    unshard(tmp_path / "out", tmp_path / "back")
    shard_checkpoint(tmp_path / "back", tmp_path / "bf16", 4, "float32")
    layer = "layers.2.mlp.expert_mlps.mlp_op."
    for rank in range(4):
        of_back, own = rank_file(tmp_path / "bf16", rank), rank_file(tmp_path / "out", rank)
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(of_back[f"{layer}{name}.weight"], dequantized(own, name, layer))


def test_unsharding_fp8_gives_its_weights_in_the_models_dtype(model_dir, tmp_path):
    shard_checkpoint(model_dir, tmp_path / "out", 4, weights="fp8", with_mtp=True)
    unshard(tmp_path / "out", tmp_path / "back")
    shard_checkpoint(tmp_path / "back", tmp_path / "bf16", 4)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    layer = "layers.2.mlp.expert_mlps.mlp_op."
    for rank in range(4):
        of_back, own = rank_file(tmp_path / "bf16", rank), rank_file(tmp_path / "out", rank)
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(of_back[f"{layer}{name}.weight"], dequantized(own, name, layer).to(torch.bfloat16))


def configured(model_dir, form):
    """What rank_files reads of a model's config."""
    neuron_config = SimpleNamespace(
        weights=form, tp_degree=4, torch_dtype=torch.bfloat16, enable_fused_speculation=False
    )
    return SimpleNamespace(model=load_model_config(model_dir), neuron_config=neuron_config)


@pytest.mark.parametrize("written", FORMS)
@pytest.mark.parametrize("wanted", FORMS)
def test_files_of_another_form_are_refused(model_dir, tmp_path, written, wanted):
    shard_checkpoint(model_dir, tmp_path, 4, weights=written)
    if written == wanted:
        return check_rank_files(tmp_path, configured(model_dir, wanted), range(4))
    with pytest.raises(CheckpointError, match=f"shard again for weights {wanted}, bfloat16") as caught:
        check_rank_files(tmp_path, configured(model_dir, wanted), range(4))
    message = str(caught.value)
    assert "\n" not in message
    assert "tp0_sharded_checkpoint.safetensors: layers.1.mlp.expert_mlps" in message


def test_a_missing_scale_is_refused(model_dir, tmp_path):
    shard_checkpoint(model_dir, tmp_path, 4, weights="fp8")
    path = tmp_path / "weights/tp2_sharded_checkpoint.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != SCALE}, path)
    check_rank_files(tmp_path, configured(model_dir, "fp8"), [0, 1, 3])
    with pytest.raises(CheckpointError, match=f"tp2_sharded_checkpoint.safetensors: {SCALE} is missing, and F32"):
        check_rank_files(tmp_path, configured(model_dir, "fp8"), range(4))


def test_a_form_that_cannot_be_is_refused_before_anything_is_written(model_dir, tmp_path, capsys):
    with pytest.raises(ConfigError, match="weights 'int8' is not supported; use bf16, fp8, fp8-block"):
        shard_checkpoint(model_dir, tmp_path / "out", 4, weights="int8")
    assert not (tmp_path / "out").exists()
    assert main(["shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "4", "--weights", "int4"]) == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize("weights", FP8_FORMS)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("projection", ["gate", "down"])
def test_a_nan_code_names_its_tensor(tmp_path, weights, code, projection):
    name = f"{EXPERT}{projection}_proj.weight"

    def damage(tensors):
        if name in tensors:
            tensors[name].view(torch.uint8)[-1, -1] = code
        return tensors

    edit(write_encoded(tmp_path / "model", "FP8, float32 scales", CONFIG), damage)
    with pytest.raises(CheckpointError, match=f"{name}: holds NaN"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 4, weights=weights)


def test_int4_to_fp8_at_kimi_s_sizes_stays_under_2_gib(tmp_path):
    """Memory is that of the experts in work, not of the layer's 384; sixteen threads ask for more than two cores do."""
    fields = RELEASED_CONFIG | {
        "first_k_dense_replace": 0,
        "n_group": 1,
        "n_routed_experts": 16,
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "topk_group": 1,
        "vocab_size": 64,
    }
    model_dir, out_dir = tmp_path / "holes", tmp_path / "out"
    model_dir.mkdir()
    write_sparse_checkpoint(model_dir, fields, shards=1)
    grown = peak_memory_growth(shard_checkpoint, model_dir, out_dir, 64, ranks=[0], jobs=16, weights="fp8")
    assert rank_file(out_dir, 0)["layers.0.mlp.expert_mlps.mlp_op.down_proj.weight"].shape == (16, 32, 7168)
    assert 0 < grown < 2 << 30
