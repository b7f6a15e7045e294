"""Tensor parallelism at the degree of the device, with every collective; the expert kernel; rank files."""

import pytest
from nxdi_deepseek.cli import main
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import assert_equals_hugging_face, load, written
from support.models import CONFIGS, V3, random_prompts

PROMPTS = (6, 14)
# The expert kernel takes hidden sizes of whole 512s, and 16 columns and more on each rank.
KERNEL = WIDE_CONFIG | {"hidden_size": 512, "num_hidden_layers": 2}
ONE_BY_ONE = {"is_continuous_batching": True, "ctx_batch_size": 1, "tkg_batch_size": 2, "max_batch_size": 2}
SEQUENCE_PARALLEL = ONE_BY_ONE | {"sequence_parallel_enabled": True}


def assert_ranks_equal_hugging_face(model_dir, config, tp_degree, neuron, compiled_path=None):
    """Returns the DeviceModel."""
    model, device = load(model_dir, compiled_path, batch_size=2, tp_degree=tp_degree, **neuron)
    assert_equals_hugging_face(model, model_dir, random_prompts(PROMPTS, config["vocab_size"]))
    assert all(graph.calls for graph in device.graphs)
    return device


@pytest.mark.parametrize(("config", "tp_degree"), [(V3, 4), (WIDE_CONFIG, 64)], ids=["TP 4", "TP 64"])
def test_sequence_parallel_equals_hugging_face(tmp_path, config, tp_degree):
    assert_ranks_equal_hugging_face(written(tmp_path, config), config, tp_degree, SEQUENCE_PARALLEL)


@pytest.mark.parametrize(
    ("config", "tp_degree"),
    [(V3, 4), (CONFIGS["five heads"], 4), (WIDE_CONFIG, 64)],
    ids=["TP 4", "TP 4, 5 heads", "TP 64"],
)
def test_rank_files_of_shard_equal_hugging_face(tmp_path, config, tp_degree):
    model_dir, compiled = written(tmp_path, config), tmp_path / "compiled"
    assert main(["shard", str(model_dir), str(compiled), "--tp-degree", str(tp_degree), "--dtype", "float32"]) == 0
    assert_ranks_equal_hugging_face(model_dir, config, tp_degree, {}, compiled)


@pytest.mark.parametrize(
    ("tp_degree", "neuron", "fills"),
    [(4, {}, {"DynamicUpdateSlice": 4}), (2, SEQUENCE_PARALLEL, {})],  # two caches per layer, of all slots at once
    ids=["TP 4", "TP 2 sequence parallel"],
)
def test_the_expert_kernel_equals_hugging_face(tmp_path, tp_degree, neuron, fills):
    device = assert_ranks_equal_hugging_face(written(tmp_path, KERNEL), KERNEL, tp_degree, neuron)
    layers, graphs = KERNEL["num_hidden_layers"], 2
    norms = {"AwsNeuronRmsNorm": graphs * (4 * layers + 1)}
    experts = {"BlockwiseMatmul": layers - KERNEL["first_k_dense_replace"]}  # prompts only
    assert device.kernels == norms | experts | fills


def test_every_bucket_equals_hugging_face(tmp_path):
    """A prompt in each context bucket; decoding crosses from the smaller token bucket into the larger one."""
    model_dir = written(tmp_path, V3)
    buckets = {"context_encoding_buckets": [16, 32, 64], "token_generation_buckets": [64, 128]}
    model, device = load(model_dir, batch_size=1, tp_degree=2, enable_bucketing=True, max_context_length=64, **buckets)
    for prompt in random_prompts((10, 30, 58)):
        assert_equals_hugging_face(model, model_dir, [prompt], 10)
    assert {graph.name: bool(graph.calls) for graph in device.graphs} == {
        f"{tag} {bucket}": True
        for tag, field in (
            ("context_encoding_model", "context_encoding_buckets"),
            ("token_generation_model", "token_generation_buckets"),
        )
        for bucket in buckets[field]
    }
