"""What FP8 experts must do on every backend; a test module runs it by importing all of it."""

import json

import pytest
import torch
from nxdi_deepseek import backend
from nxdi_deepseek.accuracy.reference import hugging_face_model
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import DEMO_CONFIG, RELEASED_CONFIG
from nxdi_deepseek.modeling_deepseek import DeepseekV3InferenceConfig, DeepseekV3NeuronConfig

from support import models, nxdi
from support.dequantized import parts_of, write_dequantized
from support.models import greedy, load_model, make_config, random_prompts
from support.parity_suite import assert_same_choice, generate_on_rank, shipped_model_on_goldens, teacher_forced
from support.products import FastProducts

FORMS = ("fp8", "fp8-block")
# An FP8 checkpoint. 16 experts, of which a token takes 4: a step of 4 sequences computes all experts, of fewer those
# that are chosen.
FIELDS = DEMO_CONFIG | {"num_hidden_layers": 3, "num_nextn_predict_layers": 0}
LENGTHS = (9, 1, 23, 14)
WHOLE = backend.NAME == "nxdi"  # whose CPU mode cuts the whole model's tensors for its ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, FIELDS)
    return folder


@pytest.fixture(scope="module")
def judge(checkpoint, tmp_path_factory):
    """Hugging Face's model on the dequantized experts of our own FP8 values, by form and tp_degree."""
    made = {}

    def load(form, tp_degree=1):
        key = form, tp_degree
        if key not in made:
            parts = parts_of(checkpoint, WHOLE, weights=form, tp_degree=tp_degree)
            folder = write_dequantized(tmp_path_factory.mktemp("dequantized"), checkpoint, parts)
            made[key] = hugging_face_model(folder)
        return made[key]

    return load


def prompts_of(batch):
    return random_prompts(LENGTHS[:batch], FIELDS["vocab_size"])


def assert_equals(reference, prompts, tokens, logits):
    for row, prompt in enumerate(prompts):
        assert_same_choice(tokens[row], logits[row], teacher_forced(reference, prompt, tokens[row]))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_float32_equals_hugging_face_on_the_same_codes(checkpoint, judge, form, batch):
    prompts = prompts_of(batch)
    model = load_model(checkpoint, batch_size=batch, weights=form)
    assert_equals(judge(form), prompts, *greedy(model, prompts, 16))


def test_blocks_equal_hugging_face_on_the_checkpoint(checkpoint):
    """Halving changes only the odd ones among the smallest codes, by 2^-10 of a scale at the most."""
    prompts = prompts_of(2)
    tokens, logits = greedy(load_model(checkpoint, batch_size=2, weights="fp8-block"), prompts, 16)
    assert_equals(hugging_face_model(checkpoint), prompts, tokens, logits)


def generate_forms_on_rank(*arguments):
    """Runs in a process of its own, which takes longer to start than to generate."""
    return {form: generate_on_rank(*arguments, {"weights": form}) for form in FORMS}


@pytest.mark.parametrize("tp_degree", [2, 4])
def test_all_ranks_together_equal_hugging_face_on_the_same_codes(checkpoint, judge, tp_degree):
    prompts = prompts_of(2)
    initialize = nxdi.init_cpu_parallel if backend.NAME == "nxdi" else models.init_embedded
    arguments = (str(checkpoint), tp_degree, prompts)
    for found in nxdi.run_parallel(generate_forms_on_rank, tp_degree, *arguments, initialize=initialize):
        for form, (tokens, logits) in found.items():
            assert_equals(judge(form, tp_degree), prompts, tokens, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_experts_are_fp8_and_nothing_else_is(checkpoint, form, dtype):
    """NxDI's CPU mode converts no layer, and casts whole models to bfloat16, codes and scales with them."""
    model = load_model(checkpoint, batch_size=1, weights=form, torch_dtype=dtype)
    module = model.model if backend.NAME == "embedded" else model.token_generation_model.model
    kinds = {name: p.dtype for name, p in module.named_parameters() if ".mlp_op." in name}
    experts = [name for name in kinds if name.endswith(".weight")]
    assert len(experts) == 2 * (FIELDS["num_hidden_layers"] - FIELDS["first_k_dense_replace"])
    assert kinds == {
        name: kind
        for weight in experts
        for name, kind in ((weight, torch.float8_e4m3fn), (weight.removesuffix("weight") + "scale", torch.float32))
    }
    others = {p.dtype for name, p in module.named_parameters() if name not in kinds and p.is_floating_point()}
    assert others <= {dtype, torch.float32}
    state_dict = parts_of(checkpoint, WHOLE, weights=form, torch_dtype=dtype)[0]
    for name in kinds:
        assert torch.equal(module.state_dict()[name].float(), state_dict[name].float()), name


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_has_exactly_the_tensors_of_the_model(checkpoint, form):
    """NxDI loads with strict=False: a scale under another name would stay at 1."""
    model = load_model(checkpoint, batch_size=1, weights=form)
    module = model.model if backend.NAME == "embedded" else model.token_generation_model.model
    wanted = {name for name in module.state_dict() if not name.startswith("kv_mgr.")}
    converted = set(model.checkpoint_loader_fn())
    if backend.NAME == "embedded":  # has no use for them
        converted = {name for name in converted if not name.endswith(".rank")}
    assert converted == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["bf16", *FORMS])
def test_shipped_model_chooses_97_of_100_golden_tokens(form, dtype):
    with FastProducts():
        goldens, logits = shipped_model_on_goldens(dtype, weights=form)
    agreement = (logits.argmax(-1) == goldens.tokens).float().mean().item()
    print(f"{backend.NAME} {form} {dtype}: top-1 agreement {agreement:.4f} of {goldens.tokens.numel()}")
    assert agreement >= 0.97


def neuron_config(**fields):
    return DeepseekV3NeuronConfig(seq_len=128, **fields)


# What each form becomes at the released sizes on 64 ranks, by NxDI's names.
RELEASED = {
    "bf16": {"quantized": False},
    "fp8": {"quantized": True, "quantization_type": "expert_wise_per_channel_symmetric"},
    "fp8-block": {
        "quantized": True,
        "quantization_type": "blockwise_symmetric",
        "quantization_block_axis": [1, 2],
        "quantization_block_size": [128, 32],
    },
}
# What vLLM's plugin passes where override_neuron_config holds `quantized`, and what it leaves at NxDI's defaults.
OF_VLLM = {
    "quantized_checkpoints_path": None,
    "quantization_type": "per_tensor_symmetric",
    "quantization_dtype": "int8",
}


@pytest.mark.parametrize(
    "given",
    [
        lambda form: {"weights": form},
        lambda form: {"weights": form, "quantized": True},
        lambda form: {"weights": form, "quantized": True} | OF_VLLM,
        lambda form: {"weights": form, "quantized": False} | OF_VLLM,
        lambda form: {"quantized": True, "quantization_type": RELEASED[form]["quantization_type"]},
    ],
    ids=["the word", "quantized", "quantized, of vLLM", "vLLM without quantized", "NxDI's type"],
)
@pytest.mark.parametrize("form", FORMS)
def test_one_word_fills_in_what_nxdi_wants(form, given):
    config = make_config(RELEASED_CONFIG, tp_degree=64, **given(form)).neuron_config
    assert config.weights == form
    assert {name: getattr(config, name) for name in RELEASED[form]} == RELEASED[form]
    assert config.quantization_dtype == "f8e4m3"
    assert config.quantized_checkpoints_path is not None
    assert config.modules_to_not_convert


@pytest.mark.parametrize("form", RELEASED)
def test_the_form_survives_the_json_file(tmp_path, form):
    config = make_config(RELEASED_CONFIG, tp_degree=64, weights=form)
    config.save(tmp_path)
    again = DeepseekV3InferenceConfig.load(tmp_path).neuron_config
    assert again.weights == form
    assert {name: getattr(again, name) for name in RELEASED[form]} == RELEASED[form]
    assert json.loads((tmp_path / "neuron_config.json").read_text())["neuron_config"]["weights"] == form


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int8"}, "weights 'int8' is not supported; use bf16, fp8, fp8-block"),
        ({"weights": 8}, "weights '8' is not supported"),
        ({"quantized": True}, "quantized=True needs weights, one of fp8 or fp8-block"),
        ({"quantized": True, "weights": "bf16"}, "quantized=True needs weights, one of fp8 or fp8-block"),
        ({"quantization_dtype": "f8e4m3"}, "quantization_dtype='f8e4m3' needs weights"),
        ({"quantization_type": "blockwise_symmetric"}, "quantization_type='blockwise_symmetric' needs weights"),
        ({"quantized": True, "quantization_type": "per_channel_symmetric"}, "'per_channel_symmetric' is not supported"),
        (
            {"weights": "fp8", "quantization_type": "blockwise_symmetric"},
            "quantization_type 'blockwise_symmetric' is not",
        ),
        ({"weights": "fp8", "quantization_dtype": "f8e4m3fn"}, "quantization_dtype 'f8e4m3fn' is not supported"),
        ({"weights": "fp8", "quantization_dtype": "f8e5m2"}, "quantization_dtype 'f8e5m2' is not supported"),
        ({"weights": "fp8", "modules_to_not_convert": ["lm_head", "mlp"]}, "modules_to_not_convert .* leave it out"),
        ({"weights": "fp8", "quantization_block_size": [128, 32]}, "quantization_block_size .* leave it out"),
        (
            {"weights": "fp8", "quantization_scale_dtype": "f8e8m0"},
            "quantization_scale_dtype 'f8e8m0' is not supported",
        ),
    ],
)
def test_fields_that_contradict_the_form_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        neuron_config(**fields)
    assert "\n" not in str(error.value)


def test_blocks_of_128_are_refused_where_a_rank_has_fewer_columns():
    message = r"quantization_block_size \[128, 128\] does not fit, \[128, 32\] does for tp_degree 64; leave it out"
    with pytest.raises(ConfigError, match=message):
        make_config(RELEASED_CONFIG, tp_degree=64, weights="fp8-block", quantization_block_size=[128, 128])
