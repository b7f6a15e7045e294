"""Faults of the graphs that NxDI's CPU mode cannot have: each is refused, or changes the logits."""

import os
import subprocess
import sys

import pytest
import torch
from neuronx_distributed_inference.models.model_wrapper import DecoderModelInstance
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.device_graphs.device_model import DeviceModel
from nxdi_deepseek.device_graphs.replicas import Replicas, to_torch
from nxdi_deepseek.errors import DeviceGraphError
from nxdi_deepseek.graph_cost import neuron_ops
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3Model
from support.device_graphs import assert_equals_hugging_face, load, written
from support.models import V3, Session, random_prompts
from torch_neuronx.xla_impl.ops import RmsNorm

CACHE = "kv_mgr.past_key_values.0"
BUCKETS = {
    "enable_bucketing": True,
    "max_context_length": 64,
    "context_encoding_buckets": [16, 64],
    "token_generation_buckets": [64, 128],
}


@pytest.fixture
def model_dir(tmp_path):
    return written(tmp_path, V3)


@pytest.fixture
def alter(monkeypatch):
    """Puts change(module, aliases), which returns other aliases, behind DecoderModelInstance.get."""
    get = DecoderModelInstance.get

    def plant(change):
        def altered(self, bucket_rank, **kwargs):
            module, aliases = get(self, bucket_rank, **kwargs)
            return module, change(module, dict(aliases))

        monkeypatch.setattr(DecoderModelInstance, "get", altered)

    return plant


def shifted(module, aliases):
    return {state: output + 1 for state, output in aliases.items()}


def rotated(module, aliases):
    return dict(zip(aliases, [*list(aliases.values())[1:], 1], strict=True))


def last_missing(module, aliases):
    return dict(list(aliases.items())[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [(shifted, "are no cache"), (rotated, "which it updates"), (last_missing, "are no cache")],
    ids=["shifted past the end", "each the next one's", "last one missing"],
)
def test_aliases_that_fit_no_cache_are_refused(model_dir, alter, change, message):
    alter(change)
    with pytest.raises(DeviceGraphError, match=message):
        load(model_dir, batch_size=1, tp_degree=2)


def test_caches_swapped_between_layers_change_the_logits(model_dir, alter):
    def swapped(module, aliases):
        first, _, second, *_ = aliases  # the K slots of layers 0 and 1
        return aliases | {first: aliases[second], second: aliases[first]}

    alter(swapped)
    model, _ = load(model_dir, batch_size=1, tp_degree=2)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_equals_hugging_face(model, model_dir, random_prompts((9,)))


def test_a_kernel_without_an_executable_form_is_refused(model_dir, monkeypatch):
    monkeypatch.setattr(RmsNorm, "form", neuron_ops.rms_norm)  # a custom call
    with pytest.raises(DeviceGraphError, match="calls AwsNeuronRmsNorm, which does not run here"):
        load(model_dir, batch_size=1, tp_degree=2)


STALE_BUCKET = f"""
import sys
from nxdi_deepseek.device_graphs import process
process.prepare()
from neuronx_distributed_inference.models.model_wrapper import DecoderModelInstance
from support.device_graphs import load

get = DecoderModelInstance.get
def keep_length(self, bucket_rank, **kwargs):
    module, aliases = get(self, bucket_rank, **kwargs)
    print("built", flush=True)
    module.n_positions = getattr(__builtins__, sys.argv[2])(module.buckets)
    return module, aliases
DecoderModelInstance.get = keep_length
load(sys.argv[1], batch_size=1, tp_degree=2, **{BUCKETS!r})
print("loaded")
"""


@pytest.mark.parametrize("stale", ["min", "max"])
def test_a_stale_bucket_length_ends_the_lowering(model_dir, stale):
    """As torch-neuronx runs torch_xla, a shape that does not fit ends the process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STALE_BUCKET, str(model_dir), stale]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "built" in result.stdout and "loaded" not in result.stdout


def test_inputs_of_other_shapes_are_refused(model_dir):
    model, _ = load(model_dir, batch_size=1, tp_degree=2)
    graph = model.token_generation_model.model
    inputs = list(model.token_generation_model.input_generator()[0])
    inputs[1] = inputs[1][:, :-1]
    with pytest.raises(ValueError, match="Input shape .* not found"):
        graph(*inputs)


def test_a_cache_of_another_shape_is_refused_ahead_of_the_call(model_dir):
    _, device = load(model_dir, batch_size=1, tp_degree=2)
    shorter = {CACHE: device.replicas.replicate(torch.zeros(1, 1, 64, V3["qk_rope_head_dim"]))}
    with pytest.raises(DeviceGraphError, match="past_key_values.0 is .* in the graph"):
        DeviceModel(device.replicas, device.graphs, device.tensors | shorter)


def test_a_cache_that_differs_between_ranks_is_seen(model_dir):
    """Far behind the sequence, where no logit shows it."""
    model, device = load(model_dir, batch_size=1, tp_degree=2)
    session = Session(model)
    session.prefill([[5, 9, 2]])
    other = to_torch(device.tensors[CACHE][1])
    other[:, :, 100:] += 1
    device.tensors[CACHE] = device.replicas.put([to_torch(device.tensors[CACHE][0]), other])
    with pytest.raises(DeviceGraphError, match="past_key_values.0 after token_generation.* rank 0 and rank 1"):
        session.decode([7])


def test_rank_files_in_another_order_are_seen(model_dir, tmp_path):
    """Sums over ranks stay the same; the vocabulary, put together by rank, does not."""
    shard_checkpoint(model_dir, tmp_path, 2, "float32")
    first, second = (tmp_path / "weights" / f"tp{rank}_sharded_checkpoint.safetensors" for rank in range(2))
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    model, _ = load(model_dir, tmp_path, batch_size=1, tp_degree=2)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_equals_hugging_face(model, model_dir, random_prompts((9,)), 1)


def test_replicas_are_given_up_after_a_failure():
    """Those of jaxlib hang in the next call."""

    class Failing:
        def execute_sharded(self, arguments):
            raise RuntimeError("out of memory")

    replicas = Replicas.of(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        replicas.execute(Failing(), [])
    with pytest.raises(DeviceGraphError, match="load the model again"):
        replicas.execute(Failing(), [])
    assert Replicas.of(2) is not replicas


def test_a_head_that_is_not_gathered_is_refused(model_dir, monkeypatch):
    """Each rank would return its part of the vocabulary."""
    init_model = NeuronDeepseekV3Model.init_model

    def without_gather(self, config):
        init_model(self, config)
        self.lm_head.gather_output = False

    monkeypatch.setattr(NeuronDeepseekV3Model, "init_model", without_gather)
    model, _ = load(model_dir, batch_size=1, tp_degree=2)
    with pytest.raises(DeviceGraphError, match="output 0 of .* differs"):
        assert_equals_hugging_face(model, model_dir, random_prompts((9,)), 1)
