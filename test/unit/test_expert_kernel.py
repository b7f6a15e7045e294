"""The cost of the expert kernel, against counts of NKI's own tracing and against arithmetic."""

from dataclasses import replace

import pytest
from nxdi_deepseek.example_configs import RELEASED_CONFIG
from nxdi_deepseek.expert_kernel import expert_kernel_cost
from nxdi_deepseek.model_config import read_model_config

RELEASED = read_model_config(RELEASED_CONFIG)


@pytest.mark.parametrize(
    "tokens, blocks, instructions", [(512, 286, 51129), (2048, 382, 68307), (4096, 510, 91155), (8192, 766, 137019)]
)
def test_instructions_are_those_that_the_library_traces(tokens, blocks, instructions):
    cost = expert_kernel_cost(RELEASED, tokens, 64)
    assert (cost.blocks, cost.instructions) == (blocks, instructions)


@pytest.mark.parametrize("tokens, gflop, padded, mcycles", [(512, 50.4, 201.5, 4.10), (2048, 67.3, 269.2, 5.48)])
def test_a_quarter_of_the_array_is_used(tokens, gflop, padded, mcycles):
    """A rank has 32 intermediate values of an expert, the array 128 columns."""
    cost = expert_kernel_cost(RELEASED, tokens, 64)
    assert round(cost.flops / 1e9, 1) == gflop
    assert round(cost.padded_flops / 1e9, 1) == padded
    assert round(cost.cycles / 1e6, 2) == mcycles


@pytest.mark.parametrize("tokens, gflop, mcycles", [(512, 66.9, 1.38), (2048, 134.6, 2.75)])
def test_all_of_the_array_with_experts_shared_out_in_fours(tokens, gflop, mcycles):
    """A quarter of the experts, 128 wide, for the tokens that choose them: all of them in the worst case."""
    cost = expert_kernel_cost(replace(RELEASED, n_routed_experts=64), tokens, 16)
    assert cost.flops == cost.padded_flops
    assert round(cost.flops / 1e9, 1) == gflop
    assert round(cost.cycles / 1e6, 2) == mcycles


def test_what_is_read_of_512_tokens():
    all_of_it = expert_kernel_cost(RELEASED, 512, 64)
    skipping = expert_kernel_cost(RELEASED, 512, 64, skip_token=True, skip_weight=True)
    row, weights = 7168 * 2, 3 * 7168 * 32 * 2
    assert all_of_it.read_bytes == 286 * weights + (2 * 286 - 2) * 128 * row + 2 * 512 * row
    assert skipping.read_bytes == 256 * weights + 2 * 512 * 8 * row + 2 * 512 * row
    assert skipping.read_bytes + skipping.written_bytes < 0.6e9


def test_skipping_adds_few_instructions():
    plain = expert_kernel_cost(RELEASED, 512, 64).instructions
    assert 0 < expert_kernel_cost(RELEASED, 512, 64, skip_token=True, skip_weight=True).instructions - plain < 3 * 143
