"""compile() and vLLM ask the plan first: what a logical core cannot hold is refused, on Neuron only."""

import json
from types import SimpleNamespace

import pytest
import torch
from nxdi_deepseek.application import NeuronDeepseekV3ForCausalLM
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.integrations.vllm_memory import check_memory_plan
from nxdi_deepseek.model_config import read_model_config
from nxdi_deepseek.planning import load_check
from nxdi_deepseek.planning.load_check import INSTANCE_VARIABLE, check_loads
from support.models import RELEASED

MODEL = read_model_config(RELEASED)


def neuron_config(**fields):
    shape = {"tp_degree": 64, "tkg_batch_size": 1, "ctx_batch_size": 1, "max_length": 512, "max_context_length": 512}
    return SimpleNamespace(**shape | {"torch_dtype": torch.bfloat16, "logical_nc_config": 2} | fields)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A file in the place of the one that names the instance."""
    monkeypatch.delenv(INSTANCE_VARIABLE, raising=False)
    monkeypatch.setattr(load_check, "_PRODUCT", tmp_path / "product_name")
    return tmp_path / "product_name"


def test_the_machine_decides(machine):
    check_loads(MODEL, neuron_config(tp_degree=32))  # no such file
    machine.write_text("Standard PC\n")
    check_loads(MODEL, neuron_config(tp_degree=32))
    machine.write_text("trn2.48xlarge\n")
    check_loads(MODEL, neuron_config())
    with pytest.raises(ConfigError, match="42.15 of them weights"):
        check_loads(MODEL, neuron_config(tp_degree=32))


def test_the_variable_names_another_or_none(machine, monkeypatch):
    machine.write_text("trn2.48xlarge\n")
    monkeypatch.setenv(INSTANCE_VARIABLE, "any")
    check_loads(MODEL, neuron_config(tp_degree=32))
    monkeypatch.setenv(INSTANCE_VARIABLE, "trn2.3xlarge")
    with pytest.raises(ConfigError, match="trn2.3xlarge has 4 logical cores"):
        check_loads(MODEL, neuron_config())
    monkeypatch.setenv(INSTANCE_VARIABLE, "trn9")
    with pytest.raises(ConfigError, match="instance 'trn9' is not known"):
        check_loads(MODEL, neuron_config())


def test_the_form_of_weights_counts(monkeypatch):
    monkeypatch.setenv(INSTANCE_VARIABLE, "trn2.48xlarge")
    with pytest.raises(ConfigError, match="use .* or weights fp8"):
        check_loads(MODEL, neuron_config(max_length=32768))
    check_loads(MODEL, neuron_config(max_length=32768, weights="fp8-block"))


class Causal(NeuronDeepseekV3ForCausalLM):
    """Without weights and modules: what compile() reads."""

    def __init__(self, on_neuron):
        self.config = SimpleNamespace(model=MODEL, save=lambda path: None)
        self.neuron_config = neuron_config(tp_degree=32)
        self._on_neuron = on_neuron

    def _runs_on_neuron(self):
        return self._on_neuron


def test_compile_refuses_on_neuron_and_not_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv(INSTANCE_VARIABLE, "trn2.48xlarge")
    with pytest.raises(ConfigError, match="a logical core of trn2.48xlarge has 24; use .*tp_degree 64"):
        Causal(on_neuron=True).compile(str(tmp_path))
    Causal(on_neuron=False).compile(str(tmp_path))


def vllm_config(model, **fields):
    shape = {"tensor_parallel_size": 64, "max_num_seqs": 1, "max_model_len": 512} | fields
    return SimpleNamespace(
        model_config=SimpleNamespace(model=model, max_model_len=shape["max_model_len"], dtype=torch.bfloat16),
        scheduler_config=SimpleNamespace(max_num_seqs=shape["max_num_seqs"]),
        parallel_config=SimpleNamespace(tensor_parallel_size=shape["tensor_parallel_size"]),
        cache_config=SimpleNamespace(
            enable_prefix_caching=bool(shape.get("block_size")),
            block_size=shape.get("block_size"),
            num_gpu_blocks_override=shape.get("num_gpu_blocks_override"),
        ),
    )


def test_vllm_refuses_what_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    long = vllm_config(str(tmp_path), max_model_len=65536)
    check_memory_plan(long, {})  # the instance is not known
    monkeypatch.setenv(INSTANCE_VARIABLE, "trn2.48xlarge")
    check_memory_plan(vllm_config(str(tmp_path)), {})
    with pytest.raises(ConfigError, match="seq_len 65536, weights bf16: .*; use seq_len "):
        check_memory_plan(long, {})
    check_memory_plan(long, {"on_cpu": True})
    blocks = {"block_size": 64, "num_gpu_blocks_override": 2048}
    in_chunks = vllm_config(str(tmp_path), max_model_len=131072, **blocks)
    check_memory_plan(in_chunks, {"max_context_length": 2048, "weights": "fp8"})
    with pytest.raises(ConfigError, match="seq_len 131072, weights fp8"):
        check_memory_plan(in_chunks, {"weights": "fp8"})  # all at once
    check_memory_plan(vllm_config("deepseek-ai/DeepSeek-V3", max_model_len=65536), {})
    with pytest.raises(ConfigError, match="seq_len 65536"):
        check_memory_plan(vllm_config(str(tmp_path)), {"seq_len": 65536})
