"""The blockwise expert kernel with and without the transfers that skip_dma_* leaves out, and what NxD passes it."""

import pytest
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import assert_equals_hugging_face, load, written
from support.models import random_prompts

# The expert kernel takes hidden sizes of whole 512s, and 16 columns and more on each rank.
KERNEL = WIDE_CONFIG | {"hidden_size": 512, "num_hidden_layers": 2}

SHARDED_BY_BLOCK = {"use_shard_on_block_dynamic_while": True, "block_sharding_strategy": "PING_PONG", "block_size": 128}
CHOICES = {
    "every transfer": SHARDED_BY_BLOCK,
    "no rows without a token": SHARDED_BY_BLOCK | {"skip_dma_token": True},
    "in torch, no rows without a token": SHARDED_BY_BLOCK | {"use_torch_block_wise": True, "skip_dma_token": True},
    "sharded by columns": {"use_shard_on_intermediate_dynamic_while": True, "skip_dma_token": True},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_user_s_choice_equals_hugging_face(tmp_path, choice):
    """Two prompts, of 6 and 14 tokens, padded to 128: most rows of the blocks hold padding or no token."""
    model_dir = written(tmp_path, KERNEL)
    model, device = load(model_dir, batch_size=2, tp_degree=4, blockwise_matmul_config=CHOICES[choice])
    assert_equals_hugging_face(model, model_dir, random_prompts((6, 14), KERNEL["vocab_size"]), 3)
    calls = [count for kernel, count in device.kernels.items() if kernel.startswith("BlockwiseMatmul")]
    assert sum(calls) == (0 if "torch" in choice else 1)
