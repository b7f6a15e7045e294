"""Metrics, gates and reports on recordings made by hand; the judges are torch and the definitions."""

import csv
import html.parser
import json

import pytest
import torch
from nxdi_deepseek.accuracy.comparison import DEFAULTS, compare, failed_gates, read_gates
from nxdi_deepseek.accuracy.metrics import judge, pearson, row_errors, tie_margin, token_metrics
from nxdi_deepseek.accuracy.recording import Entry, Recording, load_recording
from nxdi_deepseek.accuracy.report import print_table, write_report
from nxdi_deepseek.accuracy.tracing import compare_traces, flip_margin
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import ConfigError
from safetensors.torch import save_file

VOCAB, TOKENS = 64, 10
SIZES = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 2, "n_routed_experts": 8}
SIZES |= {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}


def recording(logits, own_tokens=None, dtype="float32", tokens=None):
    tokens = logits.argmax(-1).tolist() if tokens is None else tokens
    return Recording("by hand", dtype, SIZES, [Entry("x < y", [1, 2], tokens, own_tokens)], [], 0, [logits])


@pytest.fixture
def golden():
    return recording(4 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(0)))


def run_of(golden, noise, **changes):
    logits = golden.logits[0] + noise * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(1))
    return recording(logits, tokens=golden.entries[0].tokens, **changes)


def test_metrics_equal_their_definitions():
    generator = torch.Generator().manual_seed(2)
    golden = torch.randn(5, 30, generator=generator)
    ours = golden + 0.3 * torch.randn(5, 30, generator=generator)
    metrics = token_metrics(golden, ours)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (golden, ours))
    torch.testing.assert_close(metrics["kl"], torch.distributions.kl_divergence(p, q))
    ranks = golden.argsort(-1, descending=True)
    for row in range(5):
        assert metrics["top5"][row] == (int(ours[row].argmax()) in ranks[row, :5].tolist())
        assert metrics["margin"][row] == golden[row, ranks[row, 0]] - golden[row, ranks[row, 1]]
    expected = torch.corrcoef(torch.stack((golden.flatten(), ours.flatten())).double())[0, 1]
    assert pearson(golden, ours) == pytest.approx(float(expected), rel=1e-12)


def test_margin_of_a_flip_is_that_of_the_choice_that_flipped():
    """Groups (0.9 + 0.3) and (0.8 + 0.39): the first wins by 0.01, whatever its experts have."""
    scores = torch.tensor([0.9, 0.3, 0.1, 0.8, 0.39, 0.2])

    def margin(golden, ours):
        chosen = (torch.zeros(6, dtype=torch.bool).scatter(0, torch.tensor(c), True) for c in (golden, ours))
        return flip_margin(scores, *chosen, n_group=2, topk_group=1)

    assert margin([0, 1], [3, 4]) == pytest.approx(0.01)
    assert margin([0, 1], [0, 2]) == pytest.approx(0.2)


def test_row_errors_count_what_is_not_finite():
    golden = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    ours = torch.tensor([[3.0, 4.5], [0.0, 0.0], [0.0, 1.0], [float("nan"), 0.0]])
    assert row_errors(golden, ours).tolist() == [pytest.approx(0.1), 0.0, float("inf"), float("inf")]


def test_a_good_run_passes_and_a_bad_one_fails(golden):
    good, bad = (compare(golden, run_of(golden, noise), DEFAULTS["float32"]) for noise in (1e-6, 0.5))
    assert good.passed
    assert good.metrics["top1_exact"] == good.metrics["nxdi_passed"] == 1
    assert not bad.passed
    assert {"max_difference", "kl_max", "nxdi_passed"} <= set(bad.failures)


def test_a_tie_is_named_a_tie(golden):
    """Two logits closer than rounding change places: no failure of the model. Further apart, they are one."""
    margin = float(tie_margin("float32", 2, 128, torch.tensor([20.0])))
    for distance, is_tie in ((margin / 2, True), (margin * 2, False)):
        golden.logits[0][3, 10], golden.logits[0][3, 11] = 20.0, 20.0 - distance
        tokens = golden.logits[0].argmax(-1).tolist()
        golden.entries[0].tokens = tokens
        logits = golden.logits[0].clone()
        logits[3, 10] -= 2 * distance
        run = recording(logits, own_tokens=[*tokens[:3], 11, *tokens[4:]], tokens=tokens)
        comparison = compare(golden, run, {"top1_agreement": 1.0})
        assert comparison.passed is is_tie
        assert comparison.metrics["top1_exact"] == 1 - 1 / TOKENS
        free_run = comparison.prompts[0].free_run
        assert (free_run.length, free_run.is_tie) == (3, is_tie)
        assert free_run.margin == pytest.approx(distance, abs=2e-6)


def test_a_run_with_other_tokens_counts_up_to_the_first(golden):
    tokens = golden.entries[0].tokens
    other = recording(golden.logits[0].clone(), tokens=[*tokens[:4], (tokens[4] + 1) % VOCAB, *tokens[5:]])
    comparison = compare(golden, other, {})
    assert comparison.metrics["tokens"] == 5
    assert comparison.prompts[0].free_run.length == 4


def test_nxdi_forgives_a_shift_but_not_a_stretch_of_one_logit():
    golden = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 5
    assert judge(golden, golden + 3).passed
    bent = golden.clone()
    bent[golden.argmax()] *= 1.1
    assert not judge(golden, bent).passed


def test_decode_and_prefill_are_compared_without_a_reference(golden):
    run = run_of(golden, 1e-6)
    apart = [run.logits[0] + 0.01]
    gate = {"decode_prefill_max_difference": 1e-3}
    assert compare(golden, run, gate, prefilled=[run.logits[0]]).passed
    assert not compare(golden, run, gate, prefilled=apart).passed


def test_what_follows_a_tie_is_not_blamed(tmp_path):
    """Position 2 flips in a tie at layers.0: there, and from there on in layers.1, nothing is judged; before it is."""
    generator = torch.Generator().manual_seed(0)
    golden = recording(torch.randn(4, VOCAB, generator=generator))
    golden.save(tmp_path)
    (tmp_path / "trace").mkdir()
    ours = {}
    scores = torch.tensor([0.9, 0.5, 0.5 - 1e-7, 0.1, 0.2, 0.1, 0.1, 0.1]).repeat(5, 1)
    weights = (scores >= 0.5).float()
    for stage in ("embed_tokens", "layers.0", "layers.1", "norm"):
        values = {"0.output": torch.randn(5, 128, generator=generator)}
        if stage.startswith("layers"):
            values = {"0.mlp.router.scores": scores, "0.mlp.router.weights": weights} | values
        save_file(values, tmp_path / "trace" / f"{stage}.safetensors")
        ours[stage] = {name: value.clone() for name, value in values.items()}
    ours["layers.0"]["0.mlp.router.weights"][2] = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0])
    ours["layers.0"]["0.output"][2] += 1
    ours["layers.1"]["0.output"][2:] += 1
    findings = compare_traces(golden, ours.__getitem__, "float32")
    assert findings.origin is None
    assert [(flip.position, flip.kind) for flip in findings.flips] == [(2, "a tie")]
    ours["layers.1"]["0.output"][1] += 1
    assert compare_traces(golden, ours.__getitem__, "float32").origin.name == "layers.1.output"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"top1": 1}', "top1 is no gate; the gates are top1_exact"),
        ('{"kl_max": "low"}', "kl_max: 'low' must be a number"),
        ("[]", "holds no JSON object"),
    ],
)
def test_bad_gates_are_one_line(tmp_path, text, message):
    (tmp_path / "gates.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_gates(tmp_path / "gates.json")


def test_nan_fails_gates_of_either_direction():
    gates = {"kl_max": 1.0, "pearson": 0.0}
    assert set(failed_gates({"kl_max": float("nan"), "pearson": float("nan")}, gates)) == set(gates)


def test_recorded_runs_and_gates_through_the_command(golden, tmp_path, capsys):
    golden.save(tmp_path / "golden")
    run_of(golden, 0.01).save(tmp_path / "run")
    (tmp_path / "gates.json").write_text('{"max_difference": 0.1}')
    arguments = ["compare", str(tmp_path / "golden"), str(tmp_path / "run")]
    assert main(arguments) == 1
    assert "FAILED max_difference" in capsys.readouterr().out
    assert main([*arguments, "--gates", str(tmp_path / "gates.json")]) == 0
    assert main([*arguments, "--bisect"]) == 2
    assert "holds no trace; run golden with --trace" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path / "run")]) == 2
    assert "no such file; give a folder that golden or compare has written" in capsys.readouterr().err


def test_recordings_of_other_models_or_prompts_are_refused(golden):
    other = run_of(golden, 0)
    other.dimensions = SIZES | {"hidden_size": 64}
    with pytest.raises(ConfigError, match="hidden_size is 128 in the golden outputs and 64 in the run"):
        compare(golden, other, {})
    other = run_of(golden, 0)
    other.entries[0].prompt = [3]
    with pytest.raises(ConfigError, match="other prompts"):
        compare(golden, other, {})


def test_a_damaged_recording_is_one_line(golden, tmp_path):
    golden.save(tmp_path)
    (tmp_path / "logits.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ConfigError, match="not a readable recording"):
        load_recording(tmp_path)


class Page(html.parser.HTMLParser):
    """What a browser would fetch, and the text that it would show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_report_is_one_file_with_all_that_was_found(golden, tmp_path, capsys):
    comparison = compare(golden, run_of(golden, 0.5), DEFAULTS["float32"])
    write_report(comparison, tmp_path)
    print_table(comparison)
    page = Page((tmp_path / "report.html").read_text())
    assert page.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in (tmp_path / "report.html").read_text()
    assert page.tags.count("svg") == 2
    assert "FAIL" in page.text and "by hand" in page.text
    with (tmp_path / "tokens.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["golden_token"]) for row in rows] == golden.entries[0].tokens
    assert json.loads((tmp_path / "report.json").read_text())["failures"] == comparison.failures
    assert torch.equal(load_recording(tmp_path / "run").logits[0], comparison.run.logits[0])
    assert "verdict: FAIL" in capsys.readouterr().out
