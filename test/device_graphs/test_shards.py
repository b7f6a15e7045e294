"""The suite of caches that ranks share by sequence, on the graphs that NxDI would compile; and at 64 ranks."""

from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import written
from support.shard_suite import *  # noqa: F403
from support.shard_suite import assert_equal_the_whole_cache, case, run_ranks


def test_64_ranks(tmp_path):
    """Sequences of fewer tokens than ranks, and one that grows past 64."""
    cases = {"wide": case((16, 64), (3, 60), WIDE_CONFIG["vocab_size"], tp_degree=64, seq_len=128)}
    (found,) = run_ranks(written(tmp_path, WIDE_CONFIG), cases, tp_degree=64)
    assert_equal_the_whole_cache(found["wide"])
    assert [{shape[:3] for shape in shapes} for _, shapes in found["wide"]] == [
        {(2, 1, rows)} for rows in (128, 8 + 1, 2 + 1)
    ]
