"""Every row of the family through the commands, from a folder in its released layout: forms of weights, plan, generate.

test_family_doors.py has inspect, rank files in float32, golden and compare; test/integration/test_member_demo.py has
inference_demo.
"""

import json

import pytest
import torch
from nxdi_deepseek.checkpoint.convert import dequantized_state_dict
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.family import FAMILY, WRAPPERS
from nxdi_deepseek.model_config import load_model_config
from nxdi_deepseek.weight_forms import FORMS
from support.members import ALL, write_member
from support.models import greedy, load_model

TP = 2
# Halving a step of three bits is 2^-4 of a weight at most, and less than a third of that in the mean.
FP8_ERROR = 0.04


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a member; each is written once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("member")
            write_member(made[name], name, seed=0)
        return made[name]

    return get


def test_every_row_and_wrapper_has_a_folder():
    assert {config["model_type"] for config in ALL.values()} == {*FAMILY, *WRAPPERS}


def all_weights(folder):
    with Checkpoint(folder) as checkpoint:
        return dequantized_state_dict(checkpoint)


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_rank_files_of_every_form(folders, tmp_path, capsys, name, weights):
    """Sharded, verified, of the size that plan says, and unsharded into a checkpoint of the same weights."""
    folder, ranks, back = folders(name), tmp_path / "ranks", tmp_path / "back"
    with_mtp = ["--with-mtp"] if load_model_config(folder).num_nextn_predict_layers else []
    shape = ["--tp-degree", str(TP), "--weights", weights]
    assert main(["shard", str(folder), str(ranks), *shape, *with_mtp]) == 0
    assert main(["verify", str(folder), str(ranks), "--full"]) == 0
    assert main(["unshard", str(ranks), str(back)]) == 0
    assert main(["inspect", str(back), "--full"]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["plan", str(folder), *shape, "--seq-len", "64", "--format", "json"]) == 0
    sizes = {file.stat().st_size for file in (ranks / "weights").glob("*.safetensors")}
    assert sizes == {json.loads(capsys.readouterr().out)["host"]["rank_file"]}
    for tensor, before, after in pairs(all_weights(folder), all_weights(back)):
        if weights == "bf16" or ".mlp.experts." not in tensor:
            assert torch.equal(after, before if "correction_bias" in tensor else before.bfloat16().float()), tensor
        else:
            assert (after - before).norm() <= FP8_ERROR * before.norm(), tensor


def pairs(before, after):
    assert before.keys() == after.keys()
    return ((name, before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ALL)
def test_generate_prints_the_models_greedy_tokens(folders, capsys, name):
    folder = folders(name)
    prompt = json.loads((folder / "prompts.json").read_text())[0]
    options = ["--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", "6", "--dtype", "float32"]
    assert main(["generate", str(folder), *options]) == 0
    tokens = list(map(int, capsys.readouterr().out.splitlines()[-1].split()))
    expected = greedy(load_model(folder, batch_size=1), [prompt], 6)[0][0].tolist()
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == 6 or tokens[-1] in load_model_config(folder).eos_token_id
