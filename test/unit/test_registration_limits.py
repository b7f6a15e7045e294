"""What the vLLM door refuses before the engine starts; test/integration/test_vllm.py sees vLLM stop at it."""

import json
from types import SimpleNamespace

import pytest
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.integrations.vllm_config import check_features, check_limits


def vllm_config(max_model_len=64, max_num_seqs=4, overrides=None, **features):
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        cache_config=SimpleNamespace(
            enable_prefix_caching=features.get("enable_prefix_caching", False),
            num_gpu_blocks_override=features.get("num_gpu_blocks_override"),
        ),
        lora_config=features.get("lora_config"),
        speculative_config=features.get("speculative_config"),
        additional_config={"override_neuron_config": overrides} if overrides else {},
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("NEURON_COMPILED_ARTIFACTS", raising=False)
    monkeypatch.delenv("DISABLE_NEURON_CUSTOM_SCHEDULER", raising=False)


def test_defaults_pass():
    check_features(vllm_config())
    check_limits(vllm_config())
    check_limits(vllm_config(overrides={"seq_len": 64, "max_context_length": 64, "batch_size": 4}))


@pytest.mark.parametrize(
    ("name", "value"), [("enable_prefix_caching", True), ("lora_config", object()), ("speculative_config", object())]
)
def test_features(name, value):
    field = {"lora_config": "enable_lora", "enable_prefix_caching": "num_gpu_blocks_override"}.get(name, name)
    with pytest.raises(ConfigError, match=f"{field} is not supported .*; .*(pass|leave)"):
        check_features(vllm_config(**{name: value}))


def test_prefix_caching_takes_longer_prompts_than_a_chunk():
    blocks = {"enable_prefix_caching": True, "num_gpu_blocks_override": 32}
    check_features(vllm_config(**blocks))
    check_limits(vllm_config(overrides={"max_context_length": 16}, **blocks))


def test_chunked_prefill(monkeypatch):
    monkeypatch.setenv("DISABLE_NEURON_CUSTOM_SCHEDULER", "1")
    with pytest.raises(ConfigError, match="DISABLE_NEURON_CUSTOM_SCHEDULER .* chunked prefill.*; unset it|unset it"):
        check_features(vllm_config())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_context_length": 63}, "max_model_len 64 exceeds max_context_length 63 of override_neuron_config; lower"),
        ({"seq_len": 63}, "max_model_len 64 exceeds seq_len 63"),
        ({"batch_size": 3}, "max_num_seqs 4 exceeds batch_size 3"),
    ],
)
def test_limits_of_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_limits(vllm_config(overrides=overrides))


def test_limits_of_compiled_artifacts(tmp_path, monkeypatch):
    """They decide alone, since the plugin ignores the overrides then; a folder still to be filled decides nothing."""
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", str(tmp_path))
    check_limits(vllm_config())
    saved = {"neuron_config": {"seq_len": 32, "max_context_length": 32, "batch_size": 4}}
    (tmp_path / "neuron_config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="max_model_len 64 exceeds max_context_length 32 of .*neuron_config.json"):
        check_limits(vllm_config(overrides={"max_context_length": 64}))
    check_limits(vllm_config(max_model_len=32))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"neuron_config": 3}', "{"])
def test_artifacts_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, text):
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", str(tmp_path))
    (tmp_path / "neuron_config.json").write_text(text)
    with pytest.raises(ConfigError, match="neuron_config.json: cannot be read .*compile again") as error:
        check_limits(vllm_config())
    assert "\n" not in str(error.value)


def test_limits_that_say_nothing(monkeypatch):
    """null is NxDI's default, and an empty variable is none; what is no number NxDI judges itself."""
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", "")
    check_limits(vllm_config(overrides={"seq_len": None, "max_context_length": "64", "batch_size": None}))
