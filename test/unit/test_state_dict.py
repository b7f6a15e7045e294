"""Tensors in memory, from a folder and from a state dict, whole and a rank's: the numbers of the rank files."""

import pytest
import torch
from nxdi_deepseek import memory
from nxdi_deepseek.accuracy.reference import Weights
from nxdi_deepseek.checkpoint.convert import dequantized_state_dict, state_dict_of
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.layout import Combine, model_layout
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.errors import CheckpointError, ConfigError
from nxdi_deepseek.model_config import load_model_config
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM
from safetensors.torch import load_file
from support.encodings import ENCODINGS, FP8_CONFIG, SCALE, decoded, edit, write_encoded
from support.models import load_config, load_model
from support.reads import count_reads

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
NORM = "model.norm.weight"
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def stored(model_dir):
    return {name: t for path in sorted(model_dir.glob("*.safetensors")) for name, t in load_file(path).items()}


def convert(model_dir, dtype, tp_degree=1, change=lambda tensors: tensors):
    config = load_config(model_dir, torch_dtype=dtype, tp_degree=tp_degree)
    return NeuronDeepseekV3ForCausalLM.convert_hf_to_neuron_state_dict(change(stored(model_dir)), config)


def combined(model_dir, dtype):
    """Every tensor of the model as torch makes it, step by step, of tensors that torch decoded."""
    tensors = decoded(model_dir, dtype)
    model = {}
    for spec in model_layout(load_model_config(model_dir)):
        parts = [tensors[source.name] for source in spec.sources]
        if spec.combine is Combine.EXPERTS_GATE_UP:
            parts = [torch.cat([gate.T, up.T], dim=1) for gate, up in zip(parts[::2], parts[1::2], strict=True)]
        elif spec.combine is Combine.EXPERTS_DOWN:
            parts = [down.T for down in parts]
        model[spec.name] = torch.cat(parts) if spec.combine is Combine.ROWS else torch.stack(parts)
    return model


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def with_rank_tensors(tensors, numbers):
    names = ["rank_util.rank"] + [f"layers.{i}.mlp.expert_mlps.spmd_rank.rank" for i in (1, 2)]
    return tensors | {name: torch.tensor(numbers, dtype=torch.int32) for name in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_folder_and_memory_give_what_torch_gives(tmp_path, encoding, dtype):
    """The blocks of 32 divide few of the matrices."""
    write_encoded(tmp_path, encoding)
    expected = with_rank_tensors(combined(tmp_path, dtype), range(4))
    config = load_config(tmp_path, torch_dtype=dtype, tp_degree=4)
    assert_same(NeuronDeepseekV3ForCausalLM.get_state_dict(str(tmp_path), config), expected)
    assert_same(convert(tmp_path, dtype, 4), expected)


@pytest.mark.parametrize("fields", [{"q_lora_rank": None, "attention_bias": True}, {"tie_word_embeddings": True}])
def test_members_of_the_family(tmp_path, fields):
    write_encoded(tmp_path, "FP8, float32 scales", FP8_CONFIG | fields)
    expected = with_rank_tensors(combined(tmp_path, torch.bfloat16), [0])
    assert_same(convert(tmp_path, torch.bfloat16), expected)


def test_a_state_dict_may_lack_the_prefix_and_be_laid_out_otherwise(tmp_path):
    write_encoded(tmp_path, "BF16")

    def change(tensors):
        return {
            name.removeprefix("model."): t.T.contiguous().T if t.ndim == 2 else t.repeat_interleave(2)[::2]
            for name, t in tensors.items()
        }

    expected = with_rank_tensors(combined(tmp_path, torch.float32), [0])
    assert_same(convert(tmp_path, torch.float32, change=change), expected)


@pytest.mark.parametrize("tp_degree", [1, 8])
def test_a_rank_is_what_its_file_holds(tmp_path, tp_degree):
    write_encoded(tmp_path / "model", "FP8, float32 scales")
    shard_checkpoint(tmp_path / "model", tmp_path, tp_degree)
    with Checkpoint(tmp_path / "model") as checkpoint:
        for rank in range(tp_degree):
            actual = state_dict_of(checkpoint.reader, checkpoint.config, torch.bfloat16, tp_degree, rank)
            assert_same(actual, load_file(tmp_path / f"weights/tp{rank}_sharded_checkpoint.safetensors"))


def test_a_rank_reads_its_part_and_builds_no_more(tmp_path, monkeypatch):
    write_encoded(tmp_path, "BF16")
    read = count_reads(monkeypatch)
    with Checkpoint(tmp_path) as checkpoint:
        part = state_dict_of(checkpoint.reader, checkpoint.config, torch.bfloat16, 8, 3)
        columns = ("down_proj.weight", "o_proj.weight", "embed_tokens.weight")  # rows of less than a page: read whole
        model = [(name, entry) for name, entry in checkpoint.reader.entries.items() if "layers.3" not in name]
        whole = sum(entry.nbytes for name, entry in model if name.endswith(columns))
    assert sum(read) < sum(tensor.nbytes for tensor in part.values()) + whole


def test_the_embedded_runtime_builds_no_whole_state_dict(tmp_path, monkeypatch):
    write_encoded(tmp_path, "BF16")

    def refuse(*_):
        raise AssertionError("a whole state dict")

    monkeypatch.setattr(NeuronDeepseekV3ForCausalLM, "get_state_dict", refuse)
    assert load_model(tmp_path).model is not None


def test_memory_that_is_too_small_is_told_before_anything_is_built(tmp_path, monkeypatch):
    write_encoded(tmp_path, "BF16")
    config = load_config(tmp_path, tp_degree=2)
    monkeypatch.setattr(memory, "memory_limit", lambda: 1 << 20)
    with pytest.raises(ConfigError, match=r"whole model needs \d\.\d GiB of memory, and .* may use 0\.0; .*shard"):
        NeuronDeepseekV3ForCausalLM.get_state_dict(str(tmp_path), config)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ConfigError, match="larger tp_degree"):
        state_dict_of(checkpoint.reader, checkpoint.config, torch.float32, 2, 1)


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    """Limits of outer groups too; torchrun's processes share it."""
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "outer/inner/memory.max").write_text("max\n")
    (tmp_path / "outer/memory.max").write_text("5000000\n")
    (tmp_path / "self").write_text("0::/outer/inner\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "self")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.memory_limit() == 5_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.memory_limit() == 1_250_000
    (tmp_path / "self").unlink()
    assert memory.memory_limit() > 5_000_000


# Every way from a checkpoint to numbers.
PATHS = {
    "rank files": lambda d, out: shard_checkpoint(d, out, 4),
    "folder": lambda d, _: NeuronDeepseekV3ForCausalLM.get_state_dict(str(d), load_config(d)),
    "memory": lambda d, _: convert(d, torch.bfloat16),
    "rank": lambda d, _: load_model(d),
    "reference": lambda d, _: read_all(d, lambda checkpoint: dequantized_state_dict(checkpoint)),
    "golden": lambda d, _: read_all(d, golden_weights),
}


def read_all(model_dir, read):
    with Checkpoint(model_dir) as checkpoint:
        return read(checkpoint)


def golden_weights(checkpoint):
    weights = Weights(checkpoint, torch.bfloat16)
    return [weights.get(name) for name in (EXPERT, BIAS, NORM)]


def planted(value):
    def plant(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return plant


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name, dtype", [(EXPERT, torch.bfloat16), (EXPERT, torch.float16), (BIAS, torch.float32)])
def test_nan_and_infinity_are_refused_everywhere(tmp_path, path, value, name, dtype):
    write_encoded(tmp_path / "model", "BF16")
    change = planted(value)
    edit(tmp_path / "model", lambda tensors: {n: change(t.to(dtype)) if n == name else t for n, t in tensors.items()})
    with pytest.raises(CheckpointError, match=f"{name}: holds NaN or infinity"):
        PATHS[path](tmp_path / "model", tmp_path / "out")
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused_everywhere(tmp_path, path, scale):
    write_encoded(tmp_path / "model", "FP8, float32 scales")
    edit(
        tmp_path / "model",
        lambda tensors: {n: planted(scale)(t) if n == EXPERT + SCALE else t for n, t in tensors.items()},
    )
    with pytest.raises(CheckpointError, match=f"{EXPERT}{SCALE}: holds NaN or infinity"):
        PATHS[path](tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("encoding", ["FP32", "FP8, float32 scales"])
def test_a_number_that_the_dtype_cannot_hold_is_refused(tmp_path, encoding):
    """It would become infinity without a word."""
    name, value = (NORM, 3.4e38) if encoding == "FP32" else (EXPERT + SCALE, 1e38)
    write_encoded(tmp_path / "model", encoding)
    edit(
        tmp_path / "model",
        lambda tensors: {n: planted(value)(t) if n == name else t for n, t in tensors.items()},
    )
    with pytest.raises(CheckpointError, match=f"{name.removesuffix(SCALE)}: a value is larger than bfloat16 can hold"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 4)
    if encoding == "FP32":
        shard_checkpoint(tmp_path / "model", tmp_path / "wide", 4, "float32")


def test_a_large_scale_over_small_codes_is_a_number(tmp_path):
    write_encoded(tmp_path, "FP8, float32 scales")

    def change(tensors):
        if EXPERT in tensors:
            tensors[EXPERT] = torch.full_like(tensors[EXPERT].float(), 0.5).to(torch.float8_e4m3fn)
        return {n: torch.full_like(t, 1e38) if n == EXPERT + SCALE else t for n, t in tensors.items()}

    edit(tmp_path, change)
    assert_same(convert(tmp_path, torch.float32), with_rank_tensors(combined(tmp_path, torch.float32), [0]))


def test_a_missing_and_a_misshapen_tensor_are_named(tmp_path):
    write_encoded(tmp_path, "FP8, float32 scales")

    def change(tensors):
        del tensors[BIAS]
        return tensors | {EXPERT + SCALE: tensors[EXPERT + SCALE][:1], "model.layers.0.what": torch.zeros(1)}

    with pytest.raises(CheckpointError) as error:
        convert(tmp_path, torch.bfloat16, change=change)
    assert any(problem == f"{BIAS}: missing" for problem in error.value.problems)
    assert any(f"{EXPERT}{SCALE}: shape [1, 3], expected [3, 3]" in problem for problem in error.value.problems)
    assert any("model.layers.0.what: not a tensor" in problem for problem in error.value.problems)
