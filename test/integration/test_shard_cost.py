"""Decoding over a cache that ranks share, at the released sizes and 64 ranks: what rank 0's graph reads and exchanges.

Needs torch_xla beside NxD and NxDI, as test_graph_cost does.
"""

import functools
import importlib
from collections import Counter

import pytest
from nxdi_deepseek.without_sdk import stand_ins
from support import nxdi

nxdi.require_nxdi()
if stand_ins.is_stand_in(importlib.import_module("torch_xla")):
    pytest.skip("torch_xla is not installed", allow_module_level=True)

from nxdi_deepseek.example_configs import RELEASED_CONFIG  # noqa: E402
from nxdi_deepseek.graph_cost.lowerer import Lowerer  # noqa: E402
from nxdi_deepseek.graph_cost.request import Request  # noqa: E402

LENGTH = 131072
HEADS, LATENT, ROPE = 128, 512, 64


@pytest.fixture(scope="module")
def cost():
    """Of a layer's step, by part, batch and number of shards."""
    with Lowerer() as lowerer:
        yield functools.cache(
            lambda part, batch, shards: lowerer.cost(
                Request(part, "decode", LENGTH, batch, config=RELEASED_CONFIG, neuron_config={"kv_seq_shards": shards})
            )
        )


def collectives(cost):
    found = Counter()
    for item in cost.collectives:
        found[item.kind, item.payload_bytes] += item.count
    return found


def test_a_layer_at_128k_moves_55_mb_at_most(cost):
    shared, whole = cost("moe", 1, 64), cost("moe", 1, 1)
    assert shared.memory_bytes <= 55e6
    assert whole.min_bytes - shared.min_bytes >= 0.97 * LENGTH * (LATENT + ROPE) * 2 * 63 / 64


@pytest.mark.parametrize("shards", [4, 16, 64])
def test_three_collectives_are_added(cost, shards):
    """Queries in BF16, log-sum-exps and weighted sums in float32."""
    heads = HEADS * shards // 64
    added = collectives(cost("moe", 1, shards)) - collectives(cost("moe", 1, 1))
    assert added == {
        ("all-gather", heads * (LATENT + ROPE) * 2): 1,
        ("all-gather", shards * heads * 4): 1,
        ("reduce-scatter", heads * LATENT * 4): 1,
    }


@pytest.mark.parametrize("shards", [4, 16, 64])
def test_the_products_are_as_many(cost, shards):
    assert cost("attention", 1, shards).dot_flops == cost("attention", 1, 1).dot_flops


def test_a_rank_holds_a_64th_of_each_token(cost):
    assert cost("attention", 1, 64).kv_bytes_per_token == (LATENT + ROPE) * 2 // 64
