"""Rank files of model and draft are those that NxDI writes. A module of its own: NxD would keep another's groups."""

import pytest
from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek.checkpoint.sharder import shard_checkpoint  # noqa: E402
from support.mtp_drafts import write_drafted  # noqa: E402
from support.nxdi_sharding import shard_with_nxdi  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rank_files_are_those_that_nxdi_writes(tmp_path, monkeypatch, dtype):
    (tmp_path / "model").mkdir()
    model_dir = write_drafted(tmp_path / "model", "half")
    shard_with_nxdi(model_dir, tmp_path / "nxdi", 2, dtype, monkeypatch, enable_eagle_speculation=True)
    shard_checkpoint(model_dir, tmp_path / "ours", 2, dtype, fused=True)
    for rank in range(2):
        name = f"weights/tp{rank}_sharded_checkpoint.safetensors"
        assert (tmp_path / "nxdi" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
