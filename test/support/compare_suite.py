"""What compare must see on every backend; a test module runs it by importing all of it."""

import json

import pytest
from nxdi_deepseek.accuracy.comparison import DEFAULTS
from nxdi_deepseek.accuracy.golden_run import make_golden
from nxdi_deepseek.accuracy.recording import Entry, Rule
from nxdi_deepseek.accuracy.runner import evaluate
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.example_configs import DEMO_CONFIG
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM
from safetensors.torch import load_file, save_file

from support import planted_faults as faults
from support.models import CONFIGS, load_config, load_model, random_prompts

NEW_TOKENS = 8
PROMPTS = random_prompts((12, 4, 7), seed=1)
# FP8 with a grid of more than one block both ways, so that a transposed scale shows.
FIELDS = CONFIGS["v3"] | {
    "quantization_config": DEMO_CONFIG["quantization_config"],
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("released"), shift=0.0)


@pytest.fixture(scope="module")
def negative(tmp_path_factory):
    """All correction biases so low that every biased score is negative."""
    return make_case(tmp_path_factory.mktemp("negative"), shift=-2.0)


def make_case(folder, shift):
    """A checkpoint and its golden outputs, with traces."""
    model_dir = folder / "model"
    write_checkpoint(model_dir, FIELDS, seed=4)
    edit_tensors(model_dir, "e_score_correction_bias", lambda bias: bias + shift)
    entries = [Entry(None, prompt) for prompt in PROMPTS]
    rule = Rule(NEW_TOKENS)
    with Checkpoint(model_dir) as checkpoint:
        golden = make_golden(checkpoint, entries, [[]] * len(entries), rule, folder / "golden", trace=True)
    return model_dir, golden


def edit_tensors(model_dir, suffix, function):
    for shard in model_dir.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({n: function(t).contiguous() if n.endswith(suffix) else t for n, t in tensors.items()}, shard)


def run_model(case):
    model_dir, golden = case
    return load_model(model_dir, batch_size=len(PROMPTS), seq_len=32), golden


def bisect(model, golden):
    return evaluate(model, golden, DEFAULTS["float32"], bisect=True)


@pytest.mark.parametrize("name", ["released", "negative"])
def test_the_model_passes(name, request):
    comparison = bisect(*run_model(request.getfixturevalue(name)))
    assert comparison.passed, comparison.failures
    assert comparison.findings.origin is None
    assert comparison.findings.flips == []
    assert [prompt.free_run.length for prompt in comparison.prompts] == [NEW_TOKENS] * len(PROMPTS)


def test_a_compiled_folder_runs_in_batches_of_its_own_size(released, tmp_path, capsys):
    """Three prompts on a model compiled for two at a time."""
    model_dir, golden = released
    NeuronDeepseekV3ForCausalLM(str(model_dir), load_config(model_dir, batch_size=2, seq_len=32, on_cpu=True)).compile(
        str(tmp_path)
    )
    assert main(["compare", str(golden.folder), str(tmp_path)]) == 0
    assert "tokens 24, ties 0, top1_exact 1" in capsys.readouterr().out
    assert main(["compare", str(golden.folder), str(tmp_path), "--bisect"]) == 2
    assert "bisect needs batch_size 3, the number of golden prompts, not 2" in capsys.readouterr().err


def test_fp8_experts_are_judged_by_the_gates_of_bfloat16(released, tmp_path, capsys):
    """The checkpoint's own codes, but for the smallest, and float32 beside them: the same tokens."""
    model_dir, golden = released
    folder = str(golden.folder)
    assert main(["compare", folder, str(model_dir), "--weights", "fp8-block", "--out", str(tmp_path)]) == 0
    assert "top1_exact 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["gates"] == DEFAULTS["bfloat16"]
    assert main(["compare", folder, str(model_dir), "--weights", "fp8", "--bisect"]) == 2
    assert "--bisect: weights fp8 depart from golden's by more than rounding" in capsys.readouterr().err
    assert main(["compare", folder, folder, "--weights", "fp8"]) == 2
    assert "--weights fp8: is for a checkpoint folder, which" in capsys.readouterr().err


@pytest.mark.parametrize("plant", faults.FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_named(plant, request, monkeypatch):
    case = request.getfixturevalue("negative" if plant is faults.masked_groups_as_zero else "released")
    model, golden = run_model(case)
    plant(monkeypatch, model)
    comparison = bisect(model, golden)
    assert not comparison.passed
    origin = comparison.findings.origin
    assert origin.name == faults.FAULTS[plant]
    if plant is faults.gate_and_up_swapped:
        assert origin.experts == [faults.SWAPPED_EXPERT]
    if plant is faults.masked_groups_as_zero:
        assert any(flip.kind == "not a tie" for flip in comparison.findings.flips if flip.stage == "layers.1")
    if plant is faults.positions_of_the_first_sequence:
        assert origin.prompt > 0
        assert origin.position >= len(PROMPTS[origin.prompt])  # prompts all begin at position 0


def test_transposed_fp8_scales_are_named(released, tmp_path, capsys):
    """Through the command: the checkpoint itself is at fault."""
    model_dir, golden = released
    write_checkpoint(tmp_path / "model", FIELDS, seed=4)
    edit_tensors(tmp_path / "model", "_scale_inv", lambda scale: scale.T.reshape(scale.shape))
    arguments = [str(golden.folder), str(tmp_path / "model"), "--bisect", "--out", str(tmp_path / "report")]
    assert main(["compare", *arguments]) == 1
    assert "FAILED trace: layers.0.self_attn.o_proj (output projection of attention)" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["trace"]["origin"]["name"] == "layers.0.self_attn.o_proj"
    assert not report["passed"]
