"""compile() and load() on the CPU, the config's way through its JSON file, and what is refused on that way."""

import json
import os
import pathlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import nxdi

nxdi.require_nxdi()

from neuronx_distributed_inference.models.config import OnDeviceSamplingConfig  # noqa: E402
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config  # noqa: E402
from nxdi_deepseek.application import FP8_VARIABLES  # noqa: E402
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint  # noqa: E402
from nxdi_deepseek.errors import CheckpointError, ConfigError  # noqa: E402
from nxdi_deepseek.modeling_deepseek import (  # noqa: E402
    DeepseekV3InferenceConfig,
    DeepseekV3NeuronConfig,
    NeuronDeepseekV3ForCausalLM,
)
from nxdi_deepseek.weight_forms import FORMS  # noqa: E402
from support.checkpoints import write_served_checkpoint  # noqa: E402

# Values other than NxDI's defaults, of every kind of field: plain, dtype, nested config, enum, negated.
NEURON_CONFIG = {
    "tp_degree": 2,
    "batch_size": 3,
    "ctx_batch_size": 1,
    "is_continuous_batching": True,
    "seq_len": 64,
    "max_context_length": 32,
    "enable_bucketing": True,
    "context_encoding_buckets": [16, 32],
    "token_generation_buckets": [32, 64],
    "torch_dtype": torch.float32,
    "rpl_reduce_dtype": torch.bfloat16,
    "logical_nc_config": 1,
    "scratchpad_page_size": 1024,
    "save_sharded_checkpoint": True,
    "disable_normalize_top_k_affinities": True,
    "router_config": {"act_fn": "sigmoid", "dtype": "bfloat16"},
    "blockwise_matmul_config": {"block_size": 256, "block_sharding_strategy": "PING_PONG", "logical_nc_config": 1},
    "on_cpu": True,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_served_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def make_config(checkpoint, **fields):
    return DeepseekV3InferenceConfig(DeepseekV3NeuronConfig(**fields), load_config=load_pretrained_config(checkpoint))


@pytest.mark.parametrize("fields", [{}, NEURON_CONFIG], ids=["defaults", "nothing at its default"])
def test_json_file_loses_nothing(checkpoint, tmp_path, fields):
    sampling = OnDeviceSamplingConfig(do_sample=True, top_k=7, dynamic=True)
    config = make_config(checkpoint, on_device_sampling_config=sampling, **fields)
    config.save(tmp_path)
    again = DeepseekV3InferenceConfig.load(tmp_path)
    assert again.to_json_string() == config.to_json_string()
    # Enums, which the JSON shows as dicts in either case.
    saved, loaded = (c.neuron_config.blockwise_matmul_config for c in (config, again))
    assert loaded.block_sharding_strategy is saved.block_sharding_strategy
    assert loaded.logical_nc_config == saved.logical_nc_config
    assert again.neuron_config.torch_dtype is config.neuron_config.torch_dtype
    assert type(again.neuron_config.on_device_sampling_config) is OnDeviceSamplingConfig
    assert again.rope_scaling == config.rope_scaling


def test_a_model_from_the_compiled_folder_alone(checkpoint, tmp_path):
    """As vLLM starts with NEURON_COMPILED_ARTIFACTS."""
    config = make_config(checkpoint, torch_dtype=torch.float32, seq_len=32, on_cpu=True)
    first = NeuronDeepseekV3ForCausalLM(checkpoint, config)
    first.compile(tmp_path)
    nxdi.init_cpu_parallel()
    first.load(tmp_path)
    again = NeuronDeepseekV3ForCausalLM(str(tmp_path))
    again.load(str(tmp_path))
    ids = torch.tensor([[5, 17, 42]])
    positions = torch.arange(3)[None]
    logits = [model(input_ids=ids, position_ids=positions).logits for model in (first, again)]
    assert torch.equal(*logits)
    assert logits[0].shape[-1] == config.vocab_size


def test_sharding_streams(checkpoint, tmp_path, monkeypatch):
    """NxDI's way to shard, which begins by loading everything, is not taken; nor are finished files written again."""
    config = make_config(checkpoint, tp_degree=2, torch_dtype=torch.float32, save_sharded_checkpoint=True)
    model = NeuronDeepseekV3ForCausalLM(checkpoint, config)
    monkeypatch.setattr(model, "checkpoint_loader_fn", None)
    monkeypatch.setattr(model, "get_builder", None)
    model.shard_weights(str(tmp_path))
    files = [tmp_path / "weights" / f"tp{rank}_sharded_checkpoint.safetensors" for rank in range(2)]
    ranks = [load_file(file) for file in files]
    stored = {name: t for file in pathlib.Path(checkpoint).glob("*.safetensors") for name, t in load_file(file).items()}
    assert torch.equal(torch.cat([rank["lm_head.weight"] for rank in ranks]), stored["lm_head.weight"])
    gate_up = [rank["layers.1.mlp.expert_mlps.mlp_op.gate_up_proj.weight"][3].chunk(2, dim=1) for rank in ranks]
    for part, name in enumerate(("gate_proj", "up_proj")):
        expert = torch.cat([halves[part] for halves in gate_up], dim=1).T
        assert torch.equal(expert, stored[f"model.layers.1.mlp.experts.3.{name}.weight"])
    written = [file.stat().st_mtime_ns for file in files]
    model.shard_weights(str(tmp_path))
    assert [file.stat().st_mtime_ns for file in files] == written


def test_one_process_is_not_two_ranks(checkpoint):
    """NxD would run it as one rank, with half of the heads."""
    nxdi.init_cpu_parallel()
    model = NeuronDeepseekV3ForCausalLM(
        checkpoint, make_config(checkpoint, tp_degree=2, torch_dtype=torch.float32, on_cpu=True)
    )
    with pytest.raises(ConfigError, match="tp_degree 2 needs as many processes on the CPU, and has 1; .* torchrun"):
        model.load(checkpoint)


def test_quantizing_touches_neither_checkpoint_nor_path(checkpoint, tmp_path, capsys):
    """inference_demo and vLLM's plugin call it for every quantized model; NxDI's own loads Hugging Face's."""
    config = make_config(checkpoint, weights="fp8", quantized_checkpoints_path=str(tmp_path / "quantized"))
    NeuronDeepseekV3ForCausalLM.save_quantized_state_dict(str(tmp_path / "no such checkpoint"), config)
    assert "quantized_checkpoints_path is not used" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", FORMS)
def test_the_compiler_is_told_of_fp8_once(checkpoint, weights):
    model = NeuronDeepseekV3ForCausalLM(checkpoint, make_config(checkpoint, weights=weights))
    assert len(model.models) == 2
    for wrapper in model.models:
        told = wrapper.compiler_args.count("--experimental-unsafe-fp8e4m3fn-as-fp8e4m3")
        assert told == (1 if FORMS[weights].is_fp8 else 0)


@pytest.mark.parametrize("weights", FORMS)
def test_the_variables_of_fp8_are_there_ahead_of_compile_and_load(checkpoint, tmp_path, monkeypatch, weights):
    """Also where vLLM's plugin makes the model of a compiled folder alone."""
    for name in FP8_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "0") if weights == "bf16" else None
    make_config(checkpoint, weights=weights).save(tmp_path)
    NeuronDeepseekV3ForCausalLM(str(tmp_path))
    assert {os.environ.get(name) for name in FP8_VARIABLES} == {"0" if weights == "bf16" else "1"}


@pytest.mark.parametrize(
    ("files", "model"), [("fp8", "bf16"), ("bf16", "fp8"), ("fp8-block", "fp8"), ("fp8", "fp8-block")]
)
def test_rank_files_of_another_form_are_not_loaded(checkpoint, tmp_path, files, model):
    """NxDI gives the device whatever bytes the files hold."""
    shard_checkpoint(checkpoint, tmp_path, 2, weights=files)
    fields = {"tp_degree": 2, "save_sharded_checkpoint": True, "torch_dtype": torch.bfloat16}
    causal_lm = NeuronDeepseekV3ForCausalLM(checkpoint, make_config(checkpoint, weights=model, **fields))
    causal_lm.traced_model = object()
    message = (
        rf"tp0_sharded_checkpoint.safetensors: layers.1.mlp.expert_mlps.mlp_op.*shard again for weights {model}, bf"
    )
    with pytest.raises(CheckpointError, match=message) as error:
        causal_lm.load_weights(str(tmp_path))
    assert "\n" not in str(error.value)


def test_rank_files_of_the_same_form_are_loaded(checkpoint, tmp_path, monkeypatch):
    config = make_config(checkpoint, weights="fp8", tp_degree=2, save_sharded_checkpoint=True)
    model = NeuronDeepseekV3ForCausalLM(checkpoint, config)
    model.shard_weights(str(tmp_path))
    loaded = []
    model.traced_model = SimpleNamespace(nxd_model=SimpleNamespace(initialize=lambda *weights: loaded.append(weights)))
    model.load_weights(str(tmp_path))
    ((ranks, _),) = loaded
    name = "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj."
    assert [rank[name + "weight"].dtype for rank in ranks] == [torch.float8_e4m3fn] * 2
    assert [rank[name + "scale"].dtype for rank in ranks] == [torch.float32] * 2


def test_the_full_model_is_not_loaded_into_hugging_face(checkpoint, tmp_path):
    fields = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())
    full = {"num_hidden_layers": 61, "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256}
    (tmp_path / "config.json").write_text(json.dumps(fields | full))
    # No checkpoint is there to load: the refusal comes first.
    with pytest.raises(ConfigError, match=r"needs 2\d{3}\.\d GiB of memory.*--expected-outputs-path"):
        NeuronDeepseekV3ForCausalLM.load_hf_model(str(tmp_path))
