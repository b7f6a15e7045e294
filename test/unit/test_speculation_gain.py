"""What graph-cost says of a step with speculation, beside a plain one."""

from dataclasses import replace

from nxdi_deepseek.example_configs import RELEASED_CONFIG
from nxdi_deepseek.graph_cost.count import GraphCost
from nxdi_deepseek.graph_cost.request import Request
from nxdi_deepseek.graph_cost.speculation_gain import gain_lines
from nxdi_deepseek.graph_cost.time_model import Machine

NOTHING = dict.fromkeys(("dot_flops", "dot_padded_flops", "dot_cycles", "kernel_flops"), {})
NOTHING |= {"fused_bytes": 0, "instructions": 0, "collectives": [], "largest_intermediate": ""}
PLAIN = Request("model", "decode", 4096, 1, config=RELEASED_CONFIG)
MTP = replace(PLAIN, phase="speculate")


def moving(size):
    """A graph that moves so many bytes and does nothing else."""
    return GraphCost(min_bytes=int(size), largest_intermediate_bytes=0, **NOTHING)


def test_tokens_per_second_follow_from_the_bounds():
    plain, speculating = moving(2e9), moving(3e9)
    lines = list(gain_lines([PLAIN, MTP], [plain, speculating], Machine(), 0.8))
    assert len(lines) == 1
    assert "1000 MB and 0 collectives more" in lines[0]
    assert "1.20 times its tokens per second at an acceptance of 0.8" in lines[0]
    assert next(gain_lines([PLAIN, MTP], [plain, speculating], Machine(), 0.2)).endswith(": it does not pay")


def test_graphs_of_other_sizes_are_not_compared():
    other = replace(PLAIN, batch=2)
    assert not list(gain_lines([other, MTP], [moving(1e9)] * 2, Machine(), 0.8))
