"""The plan of a rank's memory: sizes against real rank files, published facts, what fits, and the command."""

import argparse
import json
import shlex

import pytest
from nxdi_deepseek.checkpoint.layout import rank_layout
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.commands import shard as shard_command
from nxdi_deepseek.dtypes import BY_SAFETENSORS, model_dtype
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.model_config import read_model_config
from nxdi_deepseek.planning.fitting import check_fits, largest_batch_size, largest_seq_len, possible_tp_degrees
from nxdi_deepseek.planning.instances import GB, INSTANCES
from nxdi_deepseek.planning.prompt_graph import activation_peak, largest_tensor, prompt_tensors
from nxdi_deepseek.planning.rank_memory import RUNTIME_RESERVE, SCRATCH_PAGE, CompiledShape, rank_memory
from nxdi_deepseek.planning.weight_parts import rank_file_bytes, weight_bytes
from nxdi_deepseek.weight_forms import BF16, FORMS, FP8, FP8_BLOCK
from support.encodings import FP8_CONFIG, write_encoded
from support.models import CONFIGS, RELEASED

MODEL = read_model_config(RELEASED)
TRN2 = INSTANCES["trn2.48xlarge"]
SMALL = FP8_CONFIG | {"moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp("model"), "FP8, float32 scales", SMALL)


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("weights", FORMS)
def test_sizes_are_those_of_the_files_that_shard_writes(model_dir, tmp_path, weights, tp_degree):
    shard_checkpoint(model_dir, tmp_path, tp_degree, weights=weights)
    sizes = {path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert sizes == {rank_file_bytes(read_model_config(SMALL), tp_degree, "bfloat16", FORMS[weights])}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_hold_every_tensor_once(name, form):
    config = read_model_config(CONFIGS[name])
    tensors = rank_layout(config, 1, model_dtype("bfloat16"), form)
    expected = 0
    for _, dtype, shape in tensors:
        size = BY_SAFETENSORS[dtype].item_bytes
        for length in shape:
            size *= length
        expected += size
    parts = weight_bytes(config, 1, "bfloat16", form)
    assert sum(parts.values()) == expected
    assert bool(parts["expert scales"]) == form.is_fp8


def test_embedding_head_experts_and_cache_at_the_released_sizes():
    parts = rank_memory(MODEL, CompiledShape(64, batch_size=2, seq_len=1024), TRN2).parts
    assert parts["embedding"] == parts["head"] == 129280 * 7168 * 2 // 64
    assert parts["experts"] == 58 * 256 * 3 * 7168 * 2048 * 2 // 64
    assert parts["shared experts"] == 58 * 3 * 7168 * 2048 * 2 // 64
    assert parts["dense MLP"] == 3 * 3 * 7168 * 18432 * 2 // 64
    assert parts["cache"] == 70272 * 2 * 1024


def contrib_weights():
    """The public contrib of the same model holds the down-projections whole on every rank."""
    down = 61 * 7168 * MODEL.latent_size * 2
    return sum(weight_bytes(MODEL, 64, "bfloat16", BF16).values()) + down - down // 64


def test_the_contribs_rank_files_have_21_4_gib():
    """Its README: about 21.4 GB each, and about 40 at TP 32; both are GiB."""
    assert contrib_weights() / 2**30 == pytest.approx(21.4, abs=0.05)
    assert sum(weight_bytes(MODEL, 32, "bfloat16", BF16).values()) / 2**30 == pytest.approx(40, abs=1)


@pytest.mark.parametrize(("seq_len", "loads"), [(512, True), (1024, False)])
def test_the_contrib_loads_with_512_tokens_and_not_with_1024(seq_len, loads):
    """It stores [k_pe | latent] twice: 140,544 bytes a token."""
    total = contrib_weights() + 140_544 * seq_len + SCRATCH_PAGE + RUNTIME_RESERVE
    assert (total <= TRN2.rank_bytes(2)) is loads


def test_bf16_does_not_fit_on_32_ranks():
    assert not rank_memory(MODEL, CompiledShape(32), TRN2).fits
    with pytest.raises(ConfigError, match="tp_degree 32.*42.15 of them weights.* has 24; use .*tp_degree 64"):
        check_fits(MODEL, CompiledShape(32), TRN2)


def test_two_ranks_share_a_bank_at_lnc_1():
    assert not rank_memory(MODEL, CompiledShape(64, lnc=1), TRN2).fits
    assert rank_memory(MODEL, CompiledShape(64, lnc=1), TRN2).capacity == 12 * GB


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("batch", [1, 8])
def test_the_largest_seq_len_fits_and_the_next_does_not(form, batch):
    shape = CompiledShape(64, batch_size=batch, form=form)
    length = largest_seq_len(MODEL, shape, TRN2)
    assert rank_memory(MODEL, shape.with_(seq_len=length), TRN2).fits
    assert not rank_memory(MODEL, shape.with_(seq_len=length + 128), TRN2).fits


def test_the_largest_batch_fits_and_the_next_does_not():
    shape = CompiledShape(64, seq_len=2048)
    batch = largest_batch_size(MODEL, shape, TRN2)
    assert rank_memory(MODEL, shape.with_(batch_size=batch), TRN2).fits
    assert not rank_memory(MODEL, shape.with_(batch_size=batch + 1), TRN2).fits


def test_a_sequence_ends_at_max_position_embeddings():
    shape = CompiledShape(64, form=FP8_BLOCK, max_context_length=2048)
    assert largest_seq_len(MODEL, shape, TRN2) == MODEL.max_position_embeddings


@pytest.mark.parametrize(
    "shape",
    [
        CompiledShape(64, seq_len=32768),
        CompiledShape(64, batch_size=64, seq_len=2048),
        CompiledShape(32),
        CompiledShape(64, batch_size=2, seq_len=65536, form=FP8),
    ],
)
def test_each_remedy_that_is_named_loads(shape):
    with pytest.raises(ConfigError) as caught:
        check_fits(MODEL, shape, TRN2)
    message = str(caught.value)
    assert "\n" not in message
    remedies = message.partition("; use ")[2].split(" or ")
    assert remedies
    for field, value in (remedy.split() for remedy in remedies):
        change = {"form": FORMS[value]} if field == "weights" else {field: int(value)}
        assert rank_memory(MODEL, shape.with_(**change), TRN2).fits, (field, value)


def test_where_nothing_loads_no_remedy_is_named():
    with pytest.raises(ConfigError, match="nothing of it loads on trn2.3xlarge$"):
        check_fits(MODEL, CompiledShape(4), INSTANCES["trn2.3xlarge"])


def test_tp_degrees_are_those_that_divide():
    assert list(possible_tp_degrees(MODEL, 64)) == [1, 2, 4, 8, 16, 32, 64]
    assert list(possible_tp_degrees(read_model_config(RELEASED | {"num_attention_heads": 24}), 64)) == [1, 2, 4, 8]


def test_activations_grow_with_the_prompt_and_fp8_decodes_a_layer():
    sizes = [activation_peak(prompt_tensors(MODEL, 64, 1, n, "bfloat16", BF16)) for n in (512, 2048, 8192, 65536)]
    assert sizes == sorted(sizes)
    layer = prompt_tensors(MODEL, 64, 1, 512, "bfloat16", FP8)["experts"]["dequantized experts"]
    assert layer == 3 * 256 * 7168 * 2048 * 2 // 64
    # The hidden states in float32, up to where the scores of a block of queries are larger.
    assert largest_tensor(prompt_tensors(MODEL, 64, 1, 2048, "bfloat16", BF16)) == 4 * 2048 * 7168


@pytest.fixture(scope="module")
def config_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(RELEASED))
    return str(path)


def test_the_command_shows_parts_and_command_lines(config_json, capsys):
    assert main(["plan", config_json, "--weights", "fp8-block", "--batch-size", "4", "--seq-len", "4096"]) == 0
    text = capsys.readouterr().out
    assert "fits, " in text
    assert "expert scales" in text
    assert "--weights fp8-block" in text


def test_what_does_not_fit_is_exit_status_1_and_has_no_command_lines(config_json, capsys):
    assert main(["plan", config_json, "--tp-degree", "32"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "what does: " in text
    assert "vllm serve" not in text


def test_json_holds_the_same_figures(config_json, capsys):
    assert main(["plan", config_json, "--format", "json", "--instance", "trn2u.48xlarge"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory = rank_memory(MODEL, CompiledShape(64), TRN2)
    assert plan["rank"] == {"parts": memory.parts, "total": memory.total, "capacity": memory.capacity, "fits": True}
    assert plan["host"]["rank_files"] == 64 * rank_file_bytes(MODEL, 64, "bfloat16", BF16)
    assert plan["host"]["disk_fits"] is None
    assert plan["largest_seq_len"]["1"] == largest_seq_len(MODEL, CompiledShape(64), TRN2)


def test_the_shard_lines_parse_with_our_command_line(config_json, capsys):
    main(["plan", config_json, "--format", "json", "--weights", "fp8"])
    lines = json.loads(capsys.readouterr().out)["commands"]
    parser = argparse.ArgumentParser()
    shard_command.add_arguments(parser)
    for name in ("shard", "shard for vLLM"):
        program, command, *words = shlex.split(lines[name])
        assert (program, command) == ("nxdi-deepseek", "shard")
        args = parser.parse_args(words)
        assert (args.tp_degree, args.weights) == (64, "fp8")


def test_vllm_is_left_out_for_short_prompts(config_json, capsys):
    main(["plan", config_json, "--format", "json", "--seq-len", "1024", "--max-context-length", "512"])
    assert set(json.loads(capsys.readouterr().out)["commands"]) == {"shard", "inference_demo"}


def test_a_picture_is_a_png(config_json, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plan", config_json, "--png", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", config_json, "--png", str(tmp_path / "missing" / "plan.png")]) == 2
    assert "choose another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--instance", "trn9"], "instance 'trn9' is not known; use trn2.48xlarge"),
        (["--tp-degree", "7"], "tp_degree 7 does not divide num_attention_heads 128"),
        (["--tp-degree", "128"], "has 64 logical cores at LNC 2"),
        (["--weights", "int4"], "weights 'int4' is not supported; use bf16, fp8, fp8-block"),
        (["--seq-len", "163841"], "--seq-len 163841 is more than max_position_embeddings 163840"),
        (["--max-context-length", "513"], "--max-context-length 513 is more than --seq-len 512"),
        (["--ctx-batch-size", "2"], "--ctx-batch-size 2 exceeds --batch-size 1"),
        (["--batch-size", "0"], "0 must be at least 1"),
    ],
)
def test_bad_arguments_are_told_in_one_line(config_json, capsys, arguments, message):
    assert main(["plan", config_json, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_a_config_is_told_in_one_line(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_lines_of_a_config_alone_name_its_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert main(["plan", str(tmp_path / "config.json"), "--format", "json"]) == 0
    for line in json.loads(capsys.readouterr().out)["commands"].values():
        assert str(tmp_path) in shlex.split(line)


def test_blocks_hold_the_batch_and_one_more():
    shape = CompiledShape(64, batch_size=8, seq_len=4096, max_context_length=2048, pa_block_size=32)
    assert rank_memory(MODEL, shape, TRN2).parts["cache"] == (8 * 4096 + 32) * 70272
    larger = CompiledShape(64, batch_size=8, seq_len=4096, pa_block_size=32, pa_num_blocks=2048)
    assert rank_memory(MODEL, larger, TRN2).parts["cache"] == 2049 * 32 * 70272


def test_chunks_bound_the_scratch_of_long_prompts():
    """Of 128 thousand tokens at once, the hidden states alone would take 1.9 GB."""
    at_once = CompiledShape(64, seq_len=131072, form=FP8)
    in_chunks = CompiledShape(64, seq_len=131072, max_context_length=2048, pa_block_size=32, form=FP8)
    assert not rank_memory(MODEL, at_once, TRN2).fits
    assert rank_memory(MODEL, in_chunks, TRN2).fits
    assert rank_memory(MODEL, in_chunks, TRN2).parts["prompt scratch"] == 3 * SCRATCH_PAGE


BLOCKS = ("--seq-len", "4096", "--max-context-length", "1024", "--block-size", "32")


def test_the_lines_of_a_cache_in_blocks(config_json, capsys):
    assert main(["plan", config_json, "--weights", "fp8", *BLOCKS, "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "prompts in chunks of 1024" in out
    assert "--enable-prefix-caching --enable-block-kv-layout --pa-block-size 32 --pa-num-blocks 256" in out
    assert "--enable-prefix-caching --block-size 32 --num-gpu-blocks-override 256" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-blocks", "4"), "--num-blocks needs --block-size"),
        (("--block-size", "48"), "--seq-len 512 is no multiple of --block-size 48"),
        ((*BLOCKS, "--num-blocks", "127"), "--num-blocks 127 cannot hold 1 sequences of 4096 tokens; raise it to 128"),
    ],
)
def test_bad_blocks_are_told_in_one_line(config_json, capsys, arguments, message):
    assert main(["plan", config_json, *arguments]) == 2
    assert message in capsys.readouterr().err
