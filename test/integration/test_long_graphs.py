"""Graphs of long contexts at the released sizes, lowered with torch_xla: what a cache in blocks costs beside others.

Costs of an expert layer are what a fifth layer adds to four.
"""

import functools
import importlib

import pytest
from nxdi_deepseek.without_sdk import stand_ins
from support import nxdi

nxdi.require_nxdi()
if stand_ins.is_stand_in(importlib.import_module("torch_xla")):
    pytest.skip("torch_xla is not installed", allow_module_level=True)

from nxdi_deepseek.errors import GraphCostError  # noqa: E402
from nxdi_deepseek.example_configs import RELEASED_CONFIG as C  # noqa: E402
from nxdi_deepseek.graph_cost.lowerer import Lowerer  # noqa: E402
from nxdi_deepseek.graph_cost.request import Request  # noqa: E402
from nxdi_deepseek.model_config import read_model_config  # noqa: E402
from nxdi_deepseek.planning.prompt_graph import largest_tensor, prompt_tensors  # noqa: E402
from nxdi_deepseek.weight_forms import BF16  # noqa: E402

BLOCKS = {"is_prefix_caching": True, "is_block_kv_layout": True, "pa_block_size": 32}
CHUNK, PREFIX = 2048, 30720


def pool(tokens):
    return BLOCKS | {"pa_num_blocks": tokens // BLOCKS["pa_block_size"]}


@pytest.fixture(scope="module")
def cost():
    """Costs of graphs of so many layers, each lowered once."""
    with Lowerer() as lowerer:

        @functools.cache
        def lowered(layers, *graph, prefix=0, blocks=0):
            neuron_config = pool(blocks) if blocks else BLOCKS if prefix else {}
            config = C | {"num_hidden_layers": layers}
            return lowerer.cost(Request(*graph, config=config, neuron_config=neuron_config, prefix=prefix))

        yield lowered


@pytest.fixture(scope="module")
def layer_bytes(cost):
    """Bytes that an expert layer of a decoding step moves."""

    def moved(length, batch, blocks=0):
        four, five = (cost(n, "model", "decode", length, batch, blocks=blocks).fused_bytes for n in (4, 5))
        return five - four

    return moved


@pytest.mark.parametrize(("length", "batch", "most"), [(32768, 1, 1.02), (4096, 8, 1.07)])
def test_a_pool_of_the_batchs_own_size_costs_what_a_contiguous_cache_does(layer_bytes, length, batch, most):
    """At 8 sequences the mask over others' blocks comes to 5 %."""
    assert layer_bytes(length, batch, blocks=length * batch) <= most * layer_bytes(length, batch)


@pytest.mark.parametrize(("length", "batch"), [(32768, 1), (4096, 8)])
def test_a_larger_pool_is_gathered_which_costs_the_cache_twice_more(layer_bytes, length, batch):
    cache = length * batch * (C["qk_rope_head_dim"] + C["kv_lora_rank"]) * 2
    more = layer_bytes(length, batch, blocks=2 * length * batch) - layer_bytes(length, batch)
    assert more == pytest.approx(2 * cache, rel=0.01)


def test_a_chunk_keeps_one_block_of_queries_scores(cost):
    """No tensor with the square of the prompt's or of the prefix's length: 512 queries of 2 heads see all keys."""
    chunk = cost(4, "model", "prefill", CHUNK, 1, prefix=PREFIX)
    assert chunk.largest_intermediate == f"f32[1,2,512,{PREFIX + CHUNK}]"
    assert chunk.largest_intermediate_bytes <= 150e6
    tensors = prompt_tensors(read_model_config(C), 64, 1, CHUNK, "bfloat16", BF16, PREFIX)
    assert largest_tensor(tensors, "attention") == chunk.largest_intermediate_bytes


def test_a_prompt_of_a_paged_model_costs_what_it_does_unpaged(cost):
    """Its mask of all pairs of tokens, which NxDI makes, is gone."""
    ours, plain = cost(4, "model", "prefill", 2048, 1, blocks=2048), cost(4, "model", "prefill", 2048, 1)
    assert ours.dot_flops == plain.dot_flops
    assert ours.fused_bytes <= 1.02 * plain.fused_bytes


def test_layers_have_no_blocks(cost):
    with pytest.raises(GraphCostError, match="a layer does not read blocks, the model does; take part model"):
        cost(4, "moe", "decode", 512, 1, blocks=512)
