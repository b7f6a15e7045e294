"""The suite of caches that ranks share by sequence, on the graphs that NxDI would compile; and at 64 ranks."""

import pytest
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import written
from support.shard_suite import *  # noqa: F403
from support.shard_suite import assert_shards_equal_the_whole_cache


@pytest.mark.parametrize("shards", [16, 64])
def test_shards_at_64_ranks(tmp_path, shards):
    """Sequences of fewer tokens than ranks, and one that grows past 64."""
    (shapes,) = assert_shards_equal_the_whole_cache(
        written(tmp_path, WIDE_CONFIG), (shards,), (3, 60), WIDE_CONFIG["vocab_size"], tp_degree=64, seq_len=128
    )
    assert {shape[:3] for shape in shapes} == {(2, 1, 128 // shards + 1)}
