"""What the MTP draft adds to a step of the released model, in the graph that NxDI would compile for rank 0."""

import functools
import importlib
from collections import Counter

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

# A dense layer and one with experts, at their real sizes: the draft is the same whatever the layers ahead of it.
CUT = C | {"num_hidden_layers": 2, "first_k_dense_replace": 1}
ROW = 2 * C["hidden_size"]  # bytes of a token's hidden state


@pytest.fixture(scope="module")
def cost():
    with Lowerer() as lowerer:
        yield functools.cache(lambda phase: lowerer.cost(Request("model", phase, 4096, 1, tp_degree=64, config=CUT)))


def test_the_draft_adds_at_most_118_megabytes_to_a_step(cost):
    """With what the model itself reads for its second token."""
    added = cost("speculate").memory_bytes - cost("decode").memory_bytes
    assert 50e6 < added <= 118e6


def test_the_last_run_of_the_draft_leaves_no_experts_in_the_graph(cost):
    """It refreshes the draft's cache alone. A layer sums over the ranks twice: one draft of a token, and two layers of
    the model for two tokens."""
    sums = Counter()
    for item in cost("speculate").collectives:
        if item.kind == "all-reduce":
            sums[item.payload_bytes] += item.count
    assert sums == {ROW: 2, 2 * ROW: 4}


def test_steps_with_speculation_are_of_a_model_that_can_draft():
    with pytest.raises(GraphCostError, match="of the whole model"):
        Request.parse("moe,speculate,4096,1", config=C)
    with pytest.raises(GraphCostError, match="no MTP layer to draft with"):
        Request.parse("model,speculate,4096,1", config=C | {"num_nextn_predict_layers": 0})
