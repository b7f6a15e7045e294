"""transformers' config and model of a checkpoint folder: the judge must be the model that config.json describes."""

import json

import pytest
import torch
from nxdi_deepseek.accuracy.reference import hugging_face_config, hugging_face_model, judge_class, reference_logits
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.errors import ConfigError
from support.models import CONFIGS, YARN

PROMPT = [5, 17, 42, 9, 88, 3]
FIELDS = CONFIGS["v3"] | {"rope_theta": 50000, "torch_dtype": "bfloat16"}


def edited(folder, *removed, **changes):
    """The checkpoint's config.json without some fields and with others."""
    path = folder / "config.json"
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name not in removed}
    path.write_text(json.dumps(fields | changes))


def logits(folder):
    return reference_logits(hugging_face_model(folder), PROMPT)


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, FIELDS)
    return tmp_path


def test_both_spellings_are_one_judge(folder):
    expected = logits(folder)
    rope = {"rope_theta": 50000, **YARN, "rope_type": "yarn"}
    edited(folder, "rope_scaling", "rope_theta", "torch_dtype", rope_parameters=rope, dtype="bfloat16")
    assert torch.equal(logits(folder), expected)
    edited(folder, rope_parameters={"rope_type": "default", "rope_theta": 50000})
    assert not torch.allclose(logits(folder), expected, atol=1e-2)


def test_the_type_may_be_deepseeks_name(folder):
    expected = logits(folder)
    edited(folder, rope_scaling=YARN | {"type": "deepseek_yarn", "truncate": True})
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(
    "stray",
    [
        {"head_dim": 24},
        {"num_key_value_heads": 1},
        {"qk_head_dim": 3},
        {"num_nextn_predict_layers": 1, "num_mtp_layers": 1},
        {"hidden_act": None},
        {"output_hidden_states": True, "use_return_dict": False},
        {"torch_dtype": "auto", "dtype": None},
        {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}},
        {"attention_dropout": 0.5, "pretraining_tp": 2},
        {"id2label": 5, "pruned_heads": 7, "_attn_implementation": "sdpa"},
    ],
    ids=lambda stray: next(iter(stray)),
)
def test_stray_fields_change_nothing(folder, stray):
    expected = logits(folder)
    edited(folder, **stray)
    assert torch.equal(logits(folder), expected)


def test_what_config_json_leaves_out_of_yarn_is_transformers_to_fill_in(folder):
    edited(folder, rope_scaling={name: YARN[name] for name in ("type", "factor", "original_max_position_embeddings")})
    with Checkpoint(folder) as checkpoint:
        rope = hugging_face_config(checkpoint).rope_scaling
    assert {"mscale", "mscale_all_dim", "beta_fast"}.isdisjoint(rope)


def test_judge_and_its_modules_come_from_the_row_of_the_family(tmp_path):
    write_checkpoint(tmp_path, CONFIGS["v3"] | {"model_type": "kimi_k2"})
    with Checkpoint(tmp_path) as checkpoint:
        assert judge_class(checkpoint.config).__name__ == checkpoint.config.member.judge
        assert judge_class(checkpoint.config, "MLP").__name__ == "DeepseekV3MLP"


def test_a_model_that_transformers_cannot_be_is_refused(tmp_path):
    """It has experts in every layer after the first dense ones, and would fill them with random numbers."""
    write_checkpoint(tmp_path, CONFIGS["v3"] | {"moe_layer_freq": 2})
    with pytest.raises(ConfigError, match="transformers' DeepseekV3ForCausalLM is another model: model.layers.1.mlp"):
        hugging_face_model(tmp_path)


def test_no_shared_experts(tmp_path):
    write_checkpoint(tmp_path, CONFIGS["v3"] | {"n_shared_experts": 0})
    assert logits(tmp_path).isfinite().all()


def test_what_transformers_refuses_is_one_line(folder, monkeypatch):
    def refuse(**_):
        raise TypeError("two\nlines")

    with Checkpoint(folder) as checkpoint:
        monkeypatch.setattr(judge_class(checkpoint.config), "config_class", refuse)
        with pytest.raises(ConfigError, match=r"config.json: transformers refuses it \(two lines\)"):
            hugging_face_config(checkpoint)
