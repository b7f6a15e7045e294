"""Heads that ranks do not divide: on the embedded runtime, in rank files and on the way back, and in the plan."""

import json

import pytest
import torch
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.unsharder import unshard
from nxdi_deepseek.checkpoint.verifier import verify_shards
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError
from safetensors.torch import load_file, save_file
from support.encodings import FP8_CONFIG, decoded, edit, write_encoded
from support.padded_heads_suite import *  # noqa: F403

HEADS, PADDED = 5, 8  # on 4 ranks
FIELDS = FP8_CONFIG | {"num_attention_heads": HEADS, "moe_intermediate_size": 128}
HEAD_SIZES = {  # rows of a head, or of o_proj columns
    "q_b_proj": FIELDS["qk_nope_head_dim"] + FIELDS["qk_rope_head_dim"],
    "kv_b_proj": FIELDS["qk_nope_head_dim"] + FIELDS["v_head_dim"],
    "o_proj": FIELDS["v_head_dim"],
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp("model"), "FP8, float32 scales", FIELDS)


def rank_file(folder, rank, part="weights"):
    return folder / part / f"tp{rank}_sharded_checkpoint.safetensors"


def with_heads_of_zeros(folder, model_dir):
    """The same model with three heads more, in BF16: their columns of q_b and kv_b and their rows of o_proj are 0."""
    fields = {name: value for name, value in FIELDS.items() if name != "quantization_config"}
    write_encoded(folder, "BF16", fields | {"num_attention_heads": PADDED})
    values = decoded(model_dir, torch.bfloat16)

    def padded(name, tensor):
        width = HEAD_SIZES.get(name.split(".")[-2], 0) * (PADDED - HEADS)
        shape = (tensor.shape[0], width) if "o_proj" in name else (width, *tensor.shape[1:])
        return torch.cat((tensor, torch.zeros(shape, dtype=tensor.dtype)), dim=1 if "o_proj" in name else 0)

    edit(folder, lambda tensors: {name: padded(name, values[name]) for name in tensors})
    return folder


@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp8-block"])
def test_rank_files_are_those_of_a_model_with_heads_of_zeros(model_dir, tmp_path, weights):
    """Attention alone where the experts' own codes are kept: the other checkpoint has none."""
    (tmp_path / "zeros").mkdir()
    zeros = with_heads_of_zeros(tmp_path / "zeros", model_dir)
    for folder, out in ((model_dir, "padded"), (zeros, "expected")):
        shard_checkpoint(folder, tmp_path / out, 4, weights=weights, with_mtp=True)
    for part in ("weights", "mtp/weights"):
        for rank in range(4):
            padded, expected = (load_file(rank_file(tmp_path / out, rank, part)) for out in ("padded", "expected"))
            assert padded.keys() == expected.keys()
            same = [name for name in expected if weights == "bf16" or ".expert_mlps." not in name]
            assert all(torch.equal(padded[name], expected[name]) for name in same)
            if weights == "bf16":
                files = (rank_file(tmp_path / out, rank, part) for out in ("padded", "expected"))
                assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp8-block"])
def test_verify_knows_the_zeros_and_unshard_drops_them(model_dir, tmp_path, weights):
    shard_checkpoint(model_dir, tmp_path / "ranks", 4, weights=weights, with_mtp=True)
    verify_shards(model_dir, tmp_path / "ranks", sample=1.0)
    unshard(tmp_path / "ranks", tmp_path / "back")
    actual = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        actual |= load_file(file)
    for name, expected in decoded(model_dir, torch.bfloat16).items():
        if weights == "bf16" or ".mlp.experts." not in name:
            assert torch.equal(actual[name], expected), name
    assert json.loads((tmp_path / "back/config.json").read_text())["num_attention_heads"] == HEADS


@pytest.mark.parametrize("projection", HEAD_SIZES)
def test_verify_finds_a_head_that_is_not_zero(model_dir, tmp_path, projection):
    shard_checkpoint(model_dir, tmp_path, 4)
    file = rank_file(tmp_path, 3)  # whose heads are all padding
    tensors, name = load_file(file), f"layers.1.self_attn.{projection}.weight"
    assert not tensors[name].any()
    tensors[name].view(-1)[7] = 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"tp3_sharded_checkpoint.safetensors: {name}"):
        verify_shards(model_dir, tmp_path, sample=1.0)


def test_the_plan_says_what_padding_costs(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    head = FIELDS["q_lora_rank"] * HEAD_SIZES["q_b_proj"] + FIELDS["kv_lora_rank"] * HEAD_SIZES["kv_b_proj"]
    head += FIELDS["hidden_size"] * HEAD_SIZES["o_proj"]
    assert main(["plan", str(tmp_path), "--tp-degree", "4", "--format", "json"]) == 0
    padding = json.loads(capsys.readouterr().out)["padding"]
    assert padding == {"heads": 5, "padded": 8, "bytes": 3 * 2 * head * FIELDS["num_hidden_layers"]}
    assert main(["plan", str(tmp_path), "--tp-degree", "4"]) == 0
    assert "5 heads padded to 8, 2 on each rank: 37.5% of their work and " in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--tp-degree", "1"]) == 0
    assert "padded" not in capsys.readouterr().out
