"""Rank files are those that NxDI's own ModelBuilder.shard_checkpoint writes, byte for byte."""

import shutil

import pytest
import torch
from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek.accuracy.reference import hugging_face_model  # noqa: E402
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint  # noqa: E402
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM  # noqa: E402
from nxdi_deepseek.weight_forms import FORMS  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from support.dequantized import write_dequantized  # noqa: E402
from support.encodings import ENCODINGS, FP8_CONFIG, write_encoded  # noqa: E402
from support.models import CONFIGS, greedy, load_config, load_model, random_prompts  # noqa: E402
from support.nxdi_sharding import shard_with_nxdi  # noqa: E402
from support.parity_suite import assert_same_choice, teacher_forced  # noqa: E402

VARIANTS = (
    "no q_lora (Moonlight)",
    "five heads",
    "attention_bias",
    "tied embeddings",
    "no dense layer",
    "two shared experts",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint; each is written once."""
    folders = {}

    def get(name, encoding):
        if (name, encoding) not in folders:
            folder = tmp_path_factory.mktemp("model")
            config = CONFIGS[name] | {key: FP8_CONFIG[key] for key in ("quantization_config", "torch_dtype")}
            folders[name, encoding] = write_encoded(folder, encoding, config)
        return folders[name, encoding]

    return get


def assert_equals_nxdi(model_dir, tmp_path, tp_degree, dtype, monkeypatch):
    shard_with_nxdi(model_dir, tmp_path / "nxdi", tp_degree, dtype, monkeypatch)
    shard_checkpoint(model_dir, tmp_path / "ours", tp_degree, dtype)
    for rank in range(tp_degree):
        file = f"weights/tp{rank}_sharded_checkpoint.safetensors"
        expected, actual = load_file(tmp_path / "nxdi" / file), load_file(tmp_path / "ours" / file)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "nxdi" / file).read_bytes()


@pytest.mark.parametrize("tp_degree", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(checkpoint, tmp_path, monkeypatch, encoding, dtype, tp_degree):
    assert_equals_nxdi(checkpoint("v3", encoding), tmp_path, tp_degree, dtype, monkeypatch)


@pytest.mark.parametrize("tp_degree", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(checkpoint, tmp_path, monkeypatch, name, dtype, tp_degree):
    assert_equals_nxdi(checkpoint(name, "FP8, float32 scales"), tmp_path, tp_degree, dtype, monkeypatch)


def test_fewer_layers_than_the_folder(checkpoint, tmp_path, monkeypatch):
    """shard_weights goes by the config in memory, as what NxDI loads does; and takes over the files next time."""
    model_dir = checkpoint("v3", "FP8, float32 scales")
    model = shard_with_nxdi(model_dir, tmp_path / "nxdi", 2, "bfloat16", monkeypatch, {"num_hidden_layers": 2})
    model.shard_weights(str(tmp_path / "ours"))
    for rank in range(2):
        file = f"weights/tp{rank}_sharded_checkpoint.safetensors"
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "nxdi" / file).read_bytes()
        assert not any(name.startswith("layers.2.") for name in load_file(tmp_path / "ours" / file))
    written = (tmp_path / "ours" / file).stat().st_mtime_ns
    model.shard_weights(str(tmp_path / "ours"))
    assert (tmp_path / "ours" / file).stat().st_mtime_ns == written


def test_compile_takes_over_rank_files_that_were_copied(checkpoint, tmp_path):
    """The checkpoint was sharded elsewhere; both came by plain copying, at other times."""
    model_dir = checkpoint("v3", "FP8, float32 scales")
    shard_checkpoint(model_dir, tmp_path / "elsewhere", 2, "bfloat16")
    for source, target in ((model_dir, "model"), (tmp_path / "elsewhere", "compiled")):
        shutil.copytree(source, tmp_path / target, copy_function=shutil.copyfile)
    config = load_config(tmp_path / "model", tp_degree=2, torch_dtype=torch.bfloat16, save_sharded_checkpoint=True)
    path = tmp_path / "compiled/weights/tp1_sharded_checkpoint.safetensors"
    written = path.stat().st_mtime_ns
    NeuronDeepseekV3ForCausalLM(str(tmp_path / "model"), config).shard_weights(str(tmp_path / "compiled"))
    assert path.stat().st_mtime_ns == written


def generate_from_rank_files(model_dir, out_dirs, prompts):
    """Tokens and logits by form of weights. Runs in a process of its own. NxDI's CPU mode has no loading of rank files,
    so they replace what it loaded."""
    return {form: generate_from_rank_file(model_dir, out_dir, prompts, form) for form, out_dir in out_dirs.items()}


def generate_from_rank_file(model_dir, out_dir, prompts, form):
    model = load_model(model_dir, batch_size=len(prompts), tp_degree=2, weights=form)
    file = f"{out_dir}/weights/tp{torch.distributed.get_rank()}_sharded_checkpoint.safetensors"
    for wrapper in model.models:
        for name, parameter in wrapper.model.named_parameters():
            if not name.startswith("kv_mgr."):
                parameter.data.zero_()
        missing, unexpected = wrapper.model.load_state_dict(load_file(file), strict=False)
        assert not unexpected
        assert all(name.startswith("kv_mgr.") for name in missing)
    return greedy(model, prompts, 8)


def test_nxdi_generates_from_rank_files_what_hugging_face_does(checkpoint, tmp_path):
    """Of FP8, on the values of the codes and scales in the files."""
    model_dir, prompts = checkpoint("v3", "FP8, float32 scales"), random_prompts((6, 11))
    judges, out_dirs = {"bf16": model_dir}, {form: str(tmp_path / form) for form in FORMS}
    for form, out_dir in out_dirs.items():
        shard_checkpoint(model_dir, out_dir, 2, "float32", weights=form)
        if form != "bf16":
            ranks = [load_file(f"{out_dir}/weights/tp{rank}_sharded_checkpoint.safetensors") for rank in range(2)]
            judges[form] = write_dequantized(tmp_path / f"{form} dequantized", model_dir, ranks)
    for found in nxdi.run_parallel(generate_from_rank_files, 2, str(model_dir), out_dirs, prompts):
        for form, (tokens, logits) in found.items():
            reference = hugging_face_model(judges[form])
            for row, prompt in enumerate(prompts):
                assert_same_choice(tokens[row], logits[row], teacher_forced(reference, prompt, tokens[row]))
