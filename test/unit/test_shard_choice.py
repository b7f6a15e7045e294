"""How many ranks share a cache: what a step's bytes and collectives speak for, and the plan of it."""

import json
import math
from types import SimpleNamespace

import pytest
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.graph_cost.time_model import Machine
from nxdi_deepseek.model_config import read_model_config
from nxdi_deepseek.planning.instances import INSTANCES
from nxdi_deepseek.planning.rank_memory import CompiledShape, rank_memory
from nxdi_deepseek.planning.shard_choice import fastest_shards, step_seconds
from nxdi_deepseek.shard_fields import check_shards
from support.models import RELEASED

MODEL = read_model_config(RELEASED)
MACHINE = Machine()


@pytest.mark.parametrize(
    ("batch", "length", "shards"), [(1, 4096, 1), (1, 131072, 64), (8, 32768, 64), (32, 4096, 16), (1, 512, 1)]
)
def test_long_contexts_and_large_batches_are_shared(batch, length, shards):
    """At 32 sequences, what 64 ranks exchange outweighs the rows that they spare."""
    assert fastest_shards(MODEL, 64, batch, length) == shards


def test_sharing_begins_where_it_spares_what_three_collectives_take():
    latencies = 3 * MACHINE.collective_seconds
    # 128 heads: queries of 576 in BF16, a number from each rank, sums of 512 in float32.
    transfers = 128 * (576 * 2 + 64 * 4 + 512 * 4) / MACHINE.link_bytes
    spared_by_a_token = 576 * 2 * (63 / 64) / MACHINE.hbm_bytes
    length = 64 * math.ceil((latencies + transfers) / spared_by_a_token / 64)
    for tokens, faster in ((length, True), (length - 64, False)):
        whole, shared = (step_seconds(MODEL, 64, shards, 1, tokens, MACHINE) for shards in (1, 64))
        assert (shared < whole) == faster


def test_only_numbers_that_divide_the_ranks_are_chosen():
    assert fastest_shards(MODEL, 32, 1, 131072) == 16
    assert fastest_shards(MODEL, 2, 1, 131072) == 1


def test_a_rank_holds_its_rows_and_one_more():
    shape = CompiledShape(64, batch_size=3, seq_len=1000)
    trn2 = INSTANCES["trn2.48xlarge"]
    found = {n: rank_memory(MODEL, shape.with_(kv_seq_shards=n), trn2).parts["cache"] for n in (1, 4, 64)}
    assert found == {1: 70272 * 3 * 1000, 4: 70272 * 3 * 251, 64: 70272 * 3 * 17}


def test_a_rank_holds_its_part_of_every_block():
    shape = CompiledShape(64, batch_size=2, seq_len=1024, pa_block_size=64, kv_seq_shards=16)
    parts = rank_memory(MODEL, shape, INSTANCES["trn2.48xlarge"]).parts
    assert parts["cache"] == 70272 * (2 * 1024 // 64 + 1) * 64 // 16
    with pytest.raises(ConfigError, match="kv_seq_shards 16 does not divide the block size 24; use 1 or 4$"):
        rank_memory(MODEL, shape.with_(pa_block_size=24), INSTANCES["trn2.48xlarge"])


@pytest.fixture
def config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RELEASED))
    return str(path)


@pytest.mark.parametrize(("asked", "shards"), [("auto", 64), ("16", 16)])
def test_the_plan_of_a_long_context(config_json, capsys, asked, shards):
    arguments = ["--weights", "fp8", "--seq-len", "131072", "--max-context-length", "2048", "--kv-seq-shards", asked]
    assert main(["plan", config_json, *arguments, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"]["kv_seq_shards"] == shards
    assert found["rank"]["parts"]["cache"] == 70272 * (131072 // shards + 1)
    assert "inference_demo" not in found["commands"]


def test_the_vllm_line_has_the_field(config_json, capsys):
    main(["plan", config_json, "--kv-seq-shards", "4", "--format", "json"])
    assert '"kv_seq_shards": 4' in json.loads(capsys.readouterr().out)["commands"]["vLLM"]


@pytest.mark.parametrize("command", [["plan"], ["graph-cost", "moe,decode,4096,1", "--model-dir"]])
def test_a_number_that_does_not_divide_is_told_in_one_line(config_json, tmp_path, capsys, command):
    assert main([*command, str(tmp_path), "--kv-seq-shards", "5"]) == 2
    assert "kv_seq_shards 5 does not divide tp_degree 64; use 1 or 4 or 16 or 64" in capsys.readouterr().err


def test_speculation_is_refused_by_name():
    fields = {"tp_degree": 64, "is_block_kv_layout": False, "enable_fused_speculation": True}
    check_shards(SimpleNamespace(kv_seq_shards=1, **fields))
    with pytest.raises(ConfigError, match="enable_fused_speculation with kv_seq_shards 64 is not supported"):
        check_shards(SimpleNamespace(kv_seq_shards=64, **fields))
