"""NxDI's CPU mode on the stand-ins computes what it should: its own Llama agrees with Hugging Face's."""

import importlib
import sys

import pytest
import torch
import transformers
from nxdi_deepseek.errors import DeepseekError
from nxdi_deepseek.without_sdk import nxdi_source, stand_ins
from support import nxdi

nxdi.require_nxdi()

PROMPTS = [[5, 17, 42, 9, 88], [61, 3, 77]]
NEW_TOKENS = 6
CONFIG = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    # Large enough for attention and logits that are far from uniform.
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.fixture(scope="module")
def hf_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()


@pytest.fixture(scope="module")
def checkpoint(hf_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    hf_model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(hf_model):
    """Every prompt alone and unpadded: tokens [B, T] and logits [B, T, V]."""
    outputs = [
        hf_model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for prompt in PROMPTS
    ]
    tokens = torch.cat([output.sequences[:, -NEW_TOKENS:] for output in outputs])
    logits = torch.cat([torch.stack(output.logits, dim=1) for output in outputs])
    return tokens, logits


ONE_BUCKET = dict(seq_len=32)
BUCKETS = dict(
    seq_len=32,
    max_context_length=16,
    enable_bucketing=True,
    context_encoding_buckets=[8, 16],
    token_generation_buckets=[8, 32],
)


def generate_with_nxdi(path, tp_degree, lengths):
    """Greedy tokens [B, T] and logits [B, T, V] of the right-padded batch."""
    from neuronx_distributed_inference.models.config import NeuronConfig
    from neuronx_distributed_inference.models.llama.modeling_llama import LlamaInferenceConfig, NeuronLlamaForCausalLM
    from neuronx_distributed_inference.utils.hf_adapter import HuggingFaceGenerationAdapter, load_pretrained_config

    neuron_config = NeuronConfig(tp_degree=tp_degree, batch_size=len(PROMPTS), torch_dtype=torch.float32, **lengths)
    model = NeuronLlamaForCausalLM(path, LlamaInferenceConfig(neuron_config, load_config=load_pretrained_config(path)))
    model.to_cpu()
    nxdi.follow_buckets(model)

    width = max(map(len, PROMPTS))
    output = HuggingFaceGenerationAdapter(model).generate(
        torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS]),
        attention_mask=torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in PROMPTS]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, width:], torch.stack(output.logits, dim=1)


def logit_tolerance(logits):
    """First-order bound on two float32 evaluations that sum in different orders: n * 2u * largest value.

    n is the number of terms summed on the way from embedding to logit: q/k/v, scores, values, o, gate/up, down in each
    layer, and the head.
    """
    hidden, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    head_dim = hidden // CONFIG["num_attention_heads"]
    context = max(map(len, PROMPTS)) + NEW_TOKENS
    terms = CONFIG["num_hidden_layers"] * (3 * hidden + head_dim + context + intermediate) + hidden
    return terms * torch.finfo(torch.float32).eps * logits.abs().max().item()


def assert_agrees(actual, expected):
    expected_tokens, expected_logits = expected
    tokens, logits = actual
    assert tokens.tolist() == expected_tokens.tolist()
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=logit_tolerance(expected_logits))


@pytest.mark.parametrize("lengths", [ONE_BUCKET, BUCKETS], ids=["one bucket", "buckets"])
def test_llama_in_this_process(checkpoint, expected, lengths):
    nxdi.init_cpu_parallel()
    assert_agrees(generate_with_nxdi(checkpoint, tp_degree=1, lengths=lengths), expected)


def test_llama_on_two_ranks(checkpoint, expected):
    for actual in nxdi.run_parallel(generate_with_nxdi, 2, checkpoint, 2, ONE_BUCKET):
        assert_agrees(actual, expected)


def test_batch_rows_differ(expected):
    """Else a padded row that took the other's answer would pass."""
    tokens, logits = expected
    assert (logits[0] - logits[1]).abs().amax(-1).min() > 100 * logit_tolerance(logits)
    assert tokens.unique().numel() > NEW_TOKENS


absent = pytest.mark.skipif(
    not stand_ins.is_stand_in(importlib.import_module("nki")), reason="the real nki is installed"
)


@absent
@pytest.mark.parametrize(
    "call",
    [
        lambda: importlib.import_module("nkilib.core.mlp.mlp").mlp(torch.ones(1)),
        lambda: importlib.import_module("nki.language").load[2](torch.ones(1)),
        lambda: importlib.import_module("torch_xla.core.xla_model").xla_device(),
        lambda: importlib.import_module("nki").jit(lambda x: x)(torch.ones(1)),
        lambda: importlib.import_module("nki").jit(mode="trace")(lambda x: x)(torch.ones(1)),
    ],
)
def test_calling_a_stand_in_fails(call):
    with pytest.raises(stand_ins.NeuronSDKUnavailable, match="was called, but the Neuron SDK is not installed"):
        call()


def test_installed_packages_are_not_replaced():
    assert not any(stand_ins.is_stand_in(sys.modules[name]) for name in ("torch", "transformers"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformers.no_such_module")


def test_transformers_sees_no_torch_xla():
    """It would otherwise import what it takes for the package."""
    assert not transformers.utils.is_torch_xla_available()
    assert not transformers.utils.is_torchvision_available()


def test_missing_source_is_explained_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NXDI_SOURCE", str(tmp_path))
    with pytest.raises(nxdi_source.NxDINotFound, match="git clone .*neuronx-distributed.* NXDI_SOURCE") as error:
        nxdi_source.find_nxdi_source()
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, DeepseekError)


def test_version_is_visible():
    assert nxdi.nxdi_version()[0].isdigit()
