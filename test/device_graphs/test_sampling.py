"""Sampling on the device: its tokens, and that no rank gathers the vocabulary for them."""

import re

import pytest
import torch
from nxdi_deepseek import modeling_deepseek
from nxdi_deepseek.accuracy.reference import hugging_face_model, reference_logits
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import TokenSession, load, top_k_top_p_at_one_half, written
from support.models import V3, random_prompts

NEW_TOKENS = 12
# A rank has more of the vocabulary than it gives to the others as its best.
WIDE = WIDE_CONFIG | {"vocab_size": 2048}
# No other axis is as long as its vocabulary.
SMALL = V3 | {"vocab_size": 320}
GREEDY = {"do_sample": False}
# The kernel of the device takes the best of all ranks in one step; without it, 64 ranks do so in three.
SAMPLED = {"do_sample": True, "dynamic": True, "deterministic": True, "global_topk": 16}
TOP_K, TOP_P, TEMPERATURE = 8.0, 0.8, 1.3


def sampling_model(model_dir, sampling, **neuron):
    return load(model_dir, on_device_sampling_config=dict(sampling), batch_size=2, **neuron)


def golden_rows(model_dir, prompts, tokens):
    """Hugging Face's logits [V] at each position that chose a token, and that token."""
    reference = hugging_face_model(model_dir)
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        yield from zip(reference_logits(reference, prompt + row)[len(prompt) - 1 : -1], row, strict=True)


def gathers_vocabulary(device, vocab_size):
    """Whether a graph gathers a value for each entry of the vocabulary."""
    return any(
        item.kind == "all-gather" and vocab_size in map(int, re.findall(r"\d+", item.payload.partition("[")[2]))
        for graph in device.graphs
        for item in graph.cost().collectives
    )


@pytest.mark.parametrize(("config", "tp_degree"), [(SMALL, 2), (WIDE, 64)], ids=["TP 2", "TP 64"])
def test_greedy_tokens_are_those_of_hugging_face(tmp_path, config, tp_degree):
    model_dir = written(tmp_path, config)
    model, device = sampling_model(model_dir, GREEDY, tp_degree=tp_degree)
    prompts = random_prompts((6, 14), config["vocab_size"])
    tokens = TokenSession(model).generate(prompts, NEW_TOKENS)
    assert all(golden.argmax() == token for golden, token in golden_rows(model_dir, prompts, tokens))
    assert device.kernels["AwsNeuronArgMax"] == 2
    # The kernel takes 128 columns and more of each rank.
    assert device.kernels["nkilib cascaded_max"] == (2 if tp_degree == 2 else 0)
    assert not gathers_vocabulary(device, config["vocab_size"])


@pytest.mark.parametrize(
    ("config", "tp_degree", "kernel"),
    [(SMALL, 2, True), (WIDE, 64, True), (WIDE, 64, False)],
    ids=["TP 2", "TP 64", "TP 64 in three stages"],
)
def test_deterministic_top_k_top_p_takes_the_token_at_one_half(tmp_path, config, tp_degree, kernel):
    model_dir = written(tmp_path, config)
    model, device = sampling_model(model_dir, SAMPLED | {"top_k_kernel_enabled": kernel}, tp_degree=tp_degree)
    prompts = random_prompts((6, 14), config["vocab_size"])
    params = torch.tensor([[TOP_K, TOP_P, TEMPERATURE]] * 2)
    tokens = TokenSession(model, params).generate(prompts, NEW_TOKENS)
    expected = [
        top_k_top_p_at_one_half(golden, int(TOP_K), TOP_P, TEMPERATURE)
        for golden, _ in golden_rows(model_dir, prompts, tokens)
    ]
    assert tokens.flatten().tolist() == [token.item() for token in expected]
    assert any(golden.argmax() != token for golden, token in golden_rows(model_dir, prompts, tokens))
    assert device.kernels["nkilib topk" if kernel else "AwsNeuronTopK"]
    assert not gathers_vocabulary(device, config["vocab_size"])


def test_random_tokens_are_drawn_anew_for_each_call(tmp_path):
    model_dir = written(tmp_path, V3)
    model, device = sampling_model(model_dir, SAMPLED | {"deterministic": False}, tp_degree=2)
    params = torch.tensor([[16.0, 1.0, 5.0]] * 2)
    session = TokenSession(model, params)
    prompts = random_prompts((6, 14))
    assert len({tuple(session.prefill(prompts).tolist()) for _ in range(8)}) > 1
    assert device.kernels["Rng"] == 2


def test_a_head_gathered_ahead_of_argmax_is_seen(tmp_path, monkeypatch):
    """By its collectives: the tokens are the same."""

    init_model = modeling_deepseek.NeuronDeepseekV3Model.init_model

    def with_gathering_head(self, config):
        init_model(self, config)
        self.lm_head.gather_output = True

    monkeypatch.setattr(modeling_deepseek.NeuronDeepseekV3Model, "init_model", with_gathering_head)
    model, device = sampling_model(written(tmp_path, SMALL), GREEDY, tp_degree=2)
    assert gathers_vocabulary(device, SMALL["vocab_size"])
