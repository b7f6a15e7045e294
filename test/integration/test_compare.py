"""The comparison on real NxDI: the same faults are found there, and NxDI's own accuracy code takes our goldens."""

import pytest
import torch
from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek.accuracy.golden_run import make_golden  # noqa: E402
from nxdi_deepseek.accuracy.metrics import TOLERANCE_MAP, judge  # noqa: E402
from nxdi_deepseek.accuracy.recording import Entry, Rule  # noqa: E402
from nxdi_deepseek.checkpoint.folder import Checkpoint  # noqa: E402
from nxdi_deepseek.cli import main  # noqa: E402
from support.checkpoints import words, write_served_checkpoint  # noqa: E402
from support.compare_suite import *  # noqa: E402, F403
from support.models import load_model  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig  # noqa: E402

NEW = 6
PROMPT = [5, 17, 42, 9]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A checkpoint with a tokenizer, and the golden outputs for a batch of 2."""
    folder = tmp_path_factory.mktemp("served")
    model_dir = write_served_checkpoint(folder)
    rule = Rule(NEW, stop_tokens=(1,), min_new_tokens=NEW)
    with Checkpoint(model_dir) as checkpoint:
        make_golden(checkpoint, [Entry(words(PROMPT), PROMPT)], [[]], rule, folder / "golden", batch_size=2)
    return model_dir, str(folder / "golden" / "expected_outputs_0.pt")


def test_the_command_runs_the_model_on_nxdi(released, capsys):  # noqa: F811
    model_dir, golden = released
    assert main(["compare", str(golden.folder), str(model_dir), "--backend", "nxdi", "--bisect"]) == 0
    assert "backend: NxDI" in capsys.readouterr().out


def check(served, mode, tokens=NEW):
    """NxDI's own check, as inference_demo calls it, loading the file as it does."""
    from neuronx_distributed_inference import inference_demo

    model_dir, expected_outputs = served
    model = load_model(model_dir, batch_size=2, seq_len=len(PROMPT) + NEW)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="right")
    inference_demo.run_accuracy_check(
        model,
        tokenizer,
        GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=1),
        words(PROMPT),
        inference_demo.CheckAccuracyMode(mode),
        divergence_difference_tol=0.001,
        tol_map=None,
        num_tokens_to_check=tokens,
        expected_outputs_path=expected_outputs,
    )


def test_nxdi_logit_matching_accepts_the_expected_outputs(served):
    check(served, "logit-matching")


def test_nxdi_token_matching_accepts_the_expected_outputs(served):
    check(served, "token-matching", tokens=None)


def test_nxdi_rejects_expected_outputs_of_another_model(served, tmp_path):
    """So acceptance means something."""
    from neuronx_distributed_inference.utils.exceptions import LogitMatchingValidationError

    model_dir, path = served
    outputs = torch.load(path)
    outputs.scores = tuple(score + 0.5 * torch.randn_like(score) for score in outputs.scores)
    torch.save(outputs, tmp_path / "other.pt")
    with pytest.raises(LogitMatchingValidationError):
        check((model_dir, str(tmp_path / "other.pt")), "logit-matching")


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_our_verdict_is_nxdis(noise, shift):
    """Its own function on the same logits: verdict, errors and divergence, with a token that is ruled out."""
    from neuronx_distributed_inference.experimental.core.accuracy import logit_validation as theirs

    generator = torch.Generator().manual_seed(int(noise * 100))
    for _ in range(12):
        golden = 3 * torch.randn(1500, generator=generator)
        ours = golden + shift + noise * torch.randn(1500, generator=generator)
        golden[7] = ours[7] = float("-inf")
        tolerances = dict(theirs.DEFAULT_TOLERANCE_MAP)
        passed, expected = theirs._validate_single_token_logits(
            golden.clone(), ours.clone(), tolerances, theirs.DEFAULT_DIVERGENCE_DIFFERENCE_TOLERANCE, remove_shift=True
        )
        verdict = judge(golden, ours)
        assert tolerances == TOLERANCE_MAP
        assert verdict.passed == passed
        assert (verdict.divergence is not None) == expected["divergence"]
        for k, error in verdict.errors.items():
            assert error == pytest.approx(max(expected["error_map"][k], 0), abs=1e-5)
