"""Reading config.json: what is refused, what counts as the same, against transformers' own reading of it."""

import pytest
import torch
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import DEMO_CONFIG
from nxdi_deepseek.model_config import load_model_config, read_model_config
from transformers import DeepseekV3Config

YARN = DEMO_CONFIG["rope_scaling"]


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


# Change of the fields -> what the message must name.
REFUSED = {
    "factor missing": ({"rope_scaling": without(YARN, "factor")}, "missing factor"),
    "factor null": ({"rope_scaling": YARN | {"factor": None}}, "missing factor"),
    "factor zero": ({"rope_scaling": YARN | {"factor": 0}}, "factor 0"),
    "factor as text": ({"rope_scaling": YARN | {"factor": "40"}}, "factor '40'"),
    "factor infinite": ({"rope_scaling": YARN | {"factor": float("inf")}}, "factor inf"),
    "mscale alone": ({"rope_scaling": without(YARN, "mscale_all_dim")}, "one of mscale and mscale_all_dim"),
    "mscale_all_dim alone": ({"rope_scaling": without(YARN, "mscale")}, "one of mscale and mscale_all_dim"),
    "mscale zero": ({"rope_scaling": YARN | {"mscale": 0}}, "mscale 0"),
    "rope type missing": ({"rope_scaling": without(YARN, "type")}, "type is missing"),
    "rope type linear": ({"rope_scaling": YARN | {"type": "linear"}}, "type is linear"),
    "two rope types": ({"rope_scaling": YARN | {"rope_type": "default"}}, "type is default, yarn"),
    "rope_scaling as text": ({"rope_scaling": "yarn"}, "rope_scaling 'yarn'"),
    "attention_factor": ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "attention_factor 1.2"),
    "truncate false": ({"rope_scaling": YARN | {"truncate": False}}, "truncate False"),
    "rope_interleave false": ({"rope_interleave": False}, "rope_interleave False"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "odd rotary width": ({"qk_rope_head_dim": 15}, "qk_rope_head_dim 15 must be even"),
    "rope_theta zero": ({"rope_theta": 0}, "rope_theta 0"),
    "n_group zero": ({"n_group": 0}, "n_group 0"),
    "n_group not a divisor": ({"n_group": 3}, "n_group 3 does not divide"),
    "topk_group too many": ({"topk_group": 5}, "topk_group 5"),
    "more experts than groups leave": ({"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
    "softmax scores": ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "a flag as text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
    "a size as text": ({"hidden_size": "192"}, "hidden_size '192'"),
    "a size as a list": ({"hidden_size": [192]}, "hidden_size [192]"),
    "a size with a fraction": ({"hidden_size": 192.5}, "hidden_size 192.5"),
    "a size beyond all": ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000"),
    "missing fields": ({"hidden_size": None, "kv_lora_rank": None}, "missing hidden_size, kv_lora_rank"),
    "another family": ({"model_type": "llama"}, "model_type 'llama'"),
    "a nested config": ({"model_type": "kimi_k25", "text_config": {}}, "missing vocab_size, hidden_size"),
    "a nested config of a known type": (
        {"text_config": {}, "hidden_size": None},
        "missing hidden_size; its text_config is",
    ),
    "dtype fp8": ({"torch_dtype": "fp8"}, "torch_dtype 'fp8'"),
    "zero block size": ({"quantization_config": {"weight_block_size": [0, 32]}}, "weight_block_size [0, 32]"),
    "negative block size": ({"quantization_config": {"weight_block_size": [32, -32]}}, "weight_block_size [32, -32]"),
    "quantization as text": ({"quantization_config": "fp8"}, "quantization_config 'fp8'"),
    "pad token outside": ({"pad_token_id": 512}, "pad_token_id 512"),
    "stop token as text": ({"eos_token_id": "1"}, "eos_token_id '1'"),
}

# Change of the fields -> the same model.
SAME = {
    "nulls for defaults": {"n_shared_experts": 1, "attention_bias": None, "moe_layer_freq": None, "pad_token_id": None},
    "whole numbers as floats": {"hidden_size": 192.0, "n_group": 4.0},
    "truncate true": {"rope_scaling": YARN | {"truncate": True}},
    "deepseek_yarn": {"rope_scaling": without(YARN, "type") | {"rope_type": "deepseek_yarn"}},
    "no partial rotary": {"partial_rotary_factor": 1.0},
    "torch. in front": {"torch_dtype": "torch.bfloat16"},
    "dtype": {"torch_dtype": None, "dtype": "bfloat16"},
    "head_dim of transformers": {"head_dim": 16, "qk_head_dim": 48},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_that_names_the_field(name):
    change, message = REFUSED[name]
    with pytest.raises(ConfigError) as refusal:
        read_model_config(DEMO_CONFIG | change)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("config.json")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", SAME)
def test_other_spellings_are_the_same_model(name):
    assert read_model_config(DEMO_CONFIG | SAME[name]) == read_model_config(DEMO_CONFIG)


def test_what_transformers_writes_is_read_as_what_it_was_made_from(tmp_path):
    """`rope_scaling` and `torch_dtype` of transformers 4, `rope_parameters` and `dtype` of 5."""
    DeepseekV3Config(**without(DEMO_CONFIG, "quantization_config")).save_pretrained(tmp_path)
    assert load_model_config(tmp_path) == read_model_config(without(DEMO_CONFIG, "quantization_config"))


def test_auto_is_no_dtype():
    assert read_model_config(DEMO_CONFIG | {"torch_dtype": "auto"}).dtype is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\ufeff{}"])
def test_a_file_that_is_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json: (cannot be read as JSON|holds no JSON object)"):
        load_model_config(tmp_path)


def test_the_config_of_nxdi_follows_its_fields():
    """They can be changed after it was made, for example to fewer layers."""
    from nxdi_deepseek.config import DeepseekV3InferenceConfig, DeepseekV3NeuronConfig

    config = DeepseekV3InferenceConfig(DeepseekV3NeuronConfig(torch_dtype=torch.float32), **DEMO_CONFIG)
    config.num_hidden_layers = 2
    assert config.model.num_hidden_layers == 2
    config.n_group = "4"
    with pytest.raises(ConfigError, match="n_group '4'"):
        config.model  # noqa: B018
