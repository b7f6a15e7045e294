"""The cache in blocks on the graphs that NxDI would compile: prefixes, chunks, steps over pool and gathered blocks."""

import pytest
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import assert_equals_hugging_face, load, written
from support.models import V3
from support.paged_suite import (  # noqa: F401
    CHUNKS,
    PAGED,
    expected,
    model_dir,
    shared_beginnings,
    test_tables_of_the_caller_in_any_order,
    test_the_smallest_pool_evicts_and_never_forgets,
)

SEQUENCE_PARALLEL = {"sequence_parallel_enabled": True}


@pytest.mark.parametrize(
    ("config", "tp_degree", "neuron"),
    [
        (V3, 4, CHUNKS | SEQUENCE_PARALLEL),
        (V3, 2, PAGED | {"max_context_length": 80, "seq_len": 160, "pa_num_blocks": 200}),  # expanded; gathered
        (WIDE_CONFIG, 64, PAGED | {"max_context_length": 64}),
    ],
    ids=["TP 4 + SP", "TP 2, gathered", "TP 64"],
)
def test_tensor_parallel_equals_hugging_face(tmp_path, config, tp_degree, neuron):
    model, device = load(written(tmp_path, config), batch_size=2, tp_degree=tp_degree, **neuron)
    prompts = shared_beginnings((100, 95), 88, config["vocab_size"])
    assert_equals_hugging_face(model, tmp_path, prompts, 6)
    assert model.paged.reused == 88
    assert {graph.name.split()[0] for graph in device.graphs if graph.calls} == {
        "context_encoding_model",
        "token_generation_model",
    }
