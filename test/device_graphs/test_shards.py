"""The suite of caches that ranks share by sequence, on the graphs that NxDI would compile; and at 64 ranks."""

import pytest
import torch
from nxdi_deepseek.device_graphs.replicas import to_torch
from nxdi_deepseek.errors import DeviceGraphError
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import load, written
from support.models import Session
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


def started(model_dir, shards):
    """A sequence of 11 tokens; the session and the DeviceModel."""
    model, device = load(model_dir, batch_size=1, tp_degree=4, seq_len=32, kv_seq_shards=shards)
    session = Session(model)
    session.prefill([[5, 9, 2, 40, 17, 8, 33, 21, 6]])
    for token in (7, 12):
        session.decode([token])
    return session, device


def test_each_rank_keeps_its_positions_and_copies_are_alike(model_dir):
    _, whole = started(model_dir, 1)
    session, shared = started(model_dir, 2)
    names = [name for name in whole.tensors if "past_key_values" in name]
    assert names
    for name in names:
        positions = to_torch(whole.tensors[name][0])[0, 0, :11]
        for rank, buffer in enumerate(shared.tensors[name]):
            own = positions[rank % 2 :: 2]
            torch.testing.assert_close(to_torch(buffer)[0, 0, : len(own)], own, rtol=0, atol=1e-5)
    # A row behind the sequence, which no logit shows, on one of the two ranks that hold it.
    buffers = [to_torch(buffer) for buffer in shared.tensors[names[0]]]
    buffers[2][:, :, 12:] += 1
    shared.tensors[names[0]] = shared.replicas.put(buffers)
    with pytest.raises(DeviceGraphError, match="after token_generation.* rank 0 and rank 2"):
        session.decode([4])
