"""What each member's checkpoint goes through beside running: inspect, shard, verify, unshard, golden, compare."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from nxdi_deepseek.accuracy.oracle import KeyValues, LayerOracle
from nxdi_deepseek.accuracy.reference import hugging_face_model, reference_logits
from nxdi_deepseek.checkpoint.convert import state_dict_of
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.family import FAMILY, WRAPPERS
from nxdi_deepseek.integrations.transformers_configs import register_configs
from nxdi_deepseek.model_config import load_model_config, read_model_config
from support import members
from support.family_suite import TOLERANCE, released  # noqa: F401
from support.members import ALL, MEMBERS, write_member
from support.models import V3

IGNORED = {
    "Kimi-K2.5": "vision: only the text model runs (2 tensors)",
    "Mistral-Small-4": "vision: only the text model runs (2 tensors)",
    "A.X-K1": "norms after dense MLPs, which the model does not use (3 tensors)",
}
NEWEST = int(transformers.__version__.partition(".")[0]) >= 5


@pytest.fixture
def folder(tmp_path, request):
    write_member(tmp_path / "model", request.param, seed=0)
    return tmp_path / "model"


def all_members(function):
    return pytest.mark.parametrize("folder", ALL, indirect=True)(function)


def weights(folder):
    """The model's tensors."""
    with Checkpoint(folder) as checkpoint:
        return state_dict_of(checkpoint.reader, checkpoint.config, torch.float32, 1)


@all_members
def test_the_released_layout_is_complete(folder, capsys, request):
    name = request.node.callspec.params["folder"]
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "complete" in said
    assert [line[9:] for line in said.splitlines() if line.startswith("ignored: ")] == [
        line for member, line in IGNORED.items() if member == name
    ]
    assert ("MTP           1 layers" in said) == bool(load_model_config(folder).num_nextn_predict_layers)


@all_members
def test_a_config_of_transformers_is_read_as_the_file(folder):
    """NxDI and vLLM take the fields from it."""
    register_configs()
    fields = transformers.AutoConfig.from_pretrained(folder).to_dict()
    of_transformers, expected = read_model_config(fields), load_model_config(folder)
    # transformers 5 has no Kimi-K2, and writes a list for A.X-K1's layers.
    assert of_transformers.member.judge == expected.member.judge
    experts = [list(map(config.has_experts, range(4))) for config in (of_transformers, expected)]
    assert experts[0] == experts[1]
    same = {"model_type": expected.model_type, "dtype": None, "moe_layer_freq": 1, "mlp_layer_types": None}
    assert replace(of_transformers, **same) == replace(expected, **same)


@all_members
def test_rank_files_give_the_weights_back(folder, tmp_path):
    ranks, back = str(tmp_path / "ranks"), str(tmp_path / "back")
    with_mtp = ["--with-mtp"] if load_model_config(folder).num_nextn_predict_layers else []
    shard = ["shard", str(folder), ranks, "--tp-degree", "4", "--dtype", "float32"]
    assert main([*shard, *with_mtp]) == 0
    assert main(["verify", str(folder), ranks, "--full"]) == 0
    assert main(["unshard", ranks, back]) == 0
    before, after = weights(folder), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_model_config(tmp_path / "back") == replace(load_model_config(folder), dtype="float32")


@all_members
def test_golden_outputs_are_the_judges(folder, tmp_path, capsys):
    """And compare finds none of the runtime's modules different. Without the judge, one line says which is missing."""
    tokens = [str(token) for token in json.loads((folder / "prompts.json").read_text())[0]]
    command = ["golden", str(folder), "--prompt-ids", ",".join(tokens), "--max-new-tokens", "6", "--trace"]
    command += ["--min-new-tokens", "6", "--out", str(tmp_path / "golden")]
    done = main(command)
    if done == 2 and not NEWEST:
        assert "install 5.24 or newer" in capsys.readouterr().err
        return
    assert done == 0
    assert main(["compare", str(tmp_path / "golden"), str(folder), "--bisect", "--dtype", "float32"]) == 0


@pytest.mark.skipif(not NEWEST, reason="the judges are in transformers 5")
@pytest.mark.parametrize("name", MEMBERS)
def test_oracle_and_whole_reference_equal_the_judge(released, name):  # noqa: F811
    folder = released[name, 0]
    whole = hugging_face_model(folder)
    prompts, tokens, logits = members.load_goldens(folder)
    for prompt, golden_tokens, expected in zip(prompts, tokens.tolist(), logits, strict=True):
        with Checkpoint(folder) as checkpoint:
            oracle = LayerOracle(checkpoint)
            hidden = {0: oracle.embed(prompt + golden_tokens[:-1])}
            for layer in range(oracle.config.num_hidden_layers):
                hidden = oracle.run_layer(layer, hidden, {0: KeyValues()})
            actual = oracle.logits(hidden[0])[len(prompt) - 1 :]
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
        rows = reference_logits(whole, prompt + golden_tokens)[len(prompt) - 1 : -1]
        torch.testing.assert_close(rows, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(not NEWEST, reason="the judges are in transformers 5")
@pytest.mark.parametrize("model_type", [name for name, member in FAMILY.items() if member.defaults])
def test_what_is_absent_means_what_it_means_to_the_judge(model_type):
    config_class = transformers.AutoConfig.for_model(model_type).__class__
    for field, default in FAMILY[model_type].defaults.items():
        if hasattr(config_class(), field):
            assert getattr(config_class(), field) == default, field


# Released model: its model_type, and what it would need.
RELATIVES = {
    "DeepSeek-V4": ("deepseek_v4", "compressed and hybrid attention is"),
    "LongCat-Flash": ("longcat_flash", "zero experts and two attentions in a layer are"),
    "GLM-5.3-Flash": ("glm5_next", "sparse attention"),
    "Kimi-Linear": ("kimi_linear", "linear attention is"),
    "Kimi-K3": ("kimi_k3", "linear attention is"),
    "A.X-K2": ("axk2", "sparse attention"),
    "Mistral-Large-4": ("mistral_large4", "sparse attention"),
}


@pytest.mark.parametrize("command", ["inspect", "plan", "generate --prompt-ids 1"])
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_are_refused_by_name(tmp_path, capsys, name, command):
    model_type, why = RELATIVES[name]
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"model_type": model_type}))
    command, *options = command.split()
    assert main([command, str(tmp_path), *options]) == 2
    said = capsys.readouterr().err
    assert f"model_type '{model_type}' is not supported: {why}" in said
    assert said.endswith(" not implemented\n") and said.count("\n") == 1


@pytest.mark.parametrize(
    "change, what",
    [
        ({"norm_topk_prob": True}, "norm_topk_prob True is not supported; supported: False"),
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; supported: greedy, group_limited"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported; supported: softmax"),
    ],
)
def test_what_deepseek_v2_does_not_have(change, what):
    with pytest.raises(ConfigError, match=what):
        read_model_config(MEMBERS["DeepSeek-V2"] | change)


@pytest.mark.parametrize("kinds", [["dense"], ["dense", "sparse", "linear"], "sparse", [1, 2, 3]])
def test_layer_types_that_cannot_be(kinds):
    with pytest.raises(ConfigError, match="mlp_layer_types .* must "):
        read_model_config(MEMBERS["GLM-4.7-Flash"] | {"mlp_layer_types": kinds})


@pytest.mark.parametrize(
    "change", [{"llama_4_scaling_beta": None}, {"rope_type": "default"}, {"partial_rotary_factor": 0.25}]
)
def test_rope_that_mistral_cannot_have(change):
    fields = MEMBERS["mistral4 with groups"]
    with pytest.raises(ConfigError, match="rope_parameters"):
        read_model_config(fields | {"rope_parameters": fields["rope_parameters"] | change})


def test_queries_that_grow_are_of_mistral_alone():
    with pytest.raises(ConfigError, match="llama_4_scaling_beta 0.1 is not supported; leave it out"):
        read_model_config(V3 | {"rope_scaling": V3["rope_scaling"] | {"llama_4_scaling_beta": 0.1}})


@pytest.mark.parametrize("folder", ["Kimi-K2.5"], indirect=True)
@pytest.mark.parametrize("text", [None, [], {"model_type": "llama"}])
def test_a_wrapper_without_a_text_model_of_the_family(folder, text):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": text}))
    with pytest.raises(ConfigError, match="text_config .* must be a JSON object|'llama' is not supported"):
        load_model_config(folder)


def test_every_wrapper_and_member_has_a_config():
    register_configs()
    for model_type in (*FAMILY, *WRAPPERS):
        assert transformers.AutoConfig.for_model(model_type).model_type == model_type
    text = transformers.AutoConfig.for_model("kimi_k25", text_config={"model_type": "deepseek_v3", "hidden_size": 48})
    assert text.get_text_config().hidden_size == 48
