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
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import DEMO_CONFIG
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


def shortened(golden, tokens, own_tokens=None):
    """A run that says what golden says, but ends after `tokens`."""
    run = recording(golden.logits[0][:tokens].clone(), own_tokens, tokens=golden.entries[0].tokens[:tokens])
    assert compare(golden, run, {}).metrics["max_difference"] == 0
    return run


def test_a_shorter_run_fails(golden):
    comparison = compare(golden, shortened(golden, 4), DEFAULTS["float32"])
    assert comparison.failures == {"length": f"prompt 0: the run has 4 tokens and golden {TOKENS}"}
    assert not compare(golden, shortened(golden, TOKENS - 1), {}).passed


def test_a_longer_run_fails(golden):
    comparison = compare(shortened(golden, 4), golden, {})
    assert comparison.failures == {"length": f"prompt 0: the run has {TOKENS} tokens and golden 4"}


def test_a_free_run_that_stops_early_fails(golden):
    tokens = golden.entries[0].tokens
    comparison = compare(golden, shortened(golden, TOKENS, own_tokens=tokens[:3]), {})
    assert comparison.failures == {"length": f"prompt 0: the free run ends after 3 tokens and golden after {TOKENS}"}
    # One that left golden before is not to be as long as it.
    elsewhere = [*tokens[:2], (tokens[2] + 1) % VOCAB]
    assert compare(golden, shortened(golden, TOKENS, own_tokens=elsewhere), {}).passed


def test_fewer_prompts_are_refused(golden):
    run = run_of(golden, 0)
    for recorded in (golden, run):
        recorded.entries *= 2
        recorded.logits *= 2
    assert compare(golden, run, {}).passed
    run.entries.pop(), run.logits.pop()
    with pytest.raises(ConfigError, match="the golden outputs have 2 prompts and the run 1"):
        compare(golden, run, {})


def test_a_shorter_recording_fails_through_the_command(golden, tmp_path, capsys):
    golden.save(tmp_path / "golden")
    shortened(golden, 6).save(tmp_path / "run")
    assert main(["compare", str(tmp_path / "golden"), str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 1
    line = f"prompt 0: the run has 6 tokens and golden {TOKENS}"
    assert f"FAILED length: {line}" in capsys.readouterr().out
    assert json.loads((tmp_path / "report" / "report.json").read_text())["failures"] == {"length": line}
    assert line in Page((tmp_path / "report" / "report.html").read_text()).text


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
        ("{}", "holds no gate; the gates are top1_exact"),
        ('{"kl_max": NaN}', "kl_max: nan must be a number"),
        ('{"kl_max": Infinity}', "kl_max: inf must be a number"),
        ('{"kl_max": true}', "kl_max: True must be a number"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_bad_gates_are_one_line(tmp_path, text, message):
    (tmp_path / "gates.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_gates(tmp_path / "gates.json")


def test_a_gate_that_a_recorded_run_cannot_be_held_to_is_refused(golden, tmp_path, capsys):
    golden.save(tmp_path / "golden")
    (tmp_path / "gates.json").write_text('{"decode_prefill_top1": 1.0}')
    folder = str(tmp_path / "golden")
    assert main(["compare", folder, folder, "--gates", str(tmp_path / "gates.json")]) == 2
    assert "decode_prefill_top1 cannot be measured on a recorded run" in capsys.readouterr().err


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


def test_damaged_logits_are_one_line(golden, tmp_path):
    golden.save(tmp_path)
    for content in (b"", b"\0" * 20, b"{}"):
        (tmp_path / "logits.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match="logits.safetensors: cannot be read .*; record it again"):
            load_recording(tmp_path)
    save_file({"0": torch.zeros(TOKENS, 3)}, tmp_path / "logits.safetensors")
    with pytest.raises(ConfigError, match=r"float32 \[10, 3\] is not float32 \[10, 64\]"):
        load_recording(tmp_path)
    (tmp_path / "logits.safetensors").unlink()
    with pytest.raises(ConfigError, match="logits.safetensors: missing"):
        load_recording(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"dtype": "float8"},
        {"dimensions": {}},
        {"dimensions": SIZES | {"vocab_size": "64"}},
        {"entries": []},
        {"entries": [{"text": None, "prompt": [1], "tokens": []}]},
        {"entries": [{"text": None, "prompt": [1, -1], "tokens": [2]}]},
        {"entries": [{"text": None, "prompt": [1], "tokens": ["2"]}]},
        {"entries": [{"prompt": [1]}]},
        {"entries": None},
        {"unknown": 1},
    ],
)
def test_a_damaged_recording_is_one_line(golden, tmp_path, change):
    golden.save(tmp_path)
    path = tmp_path / "recording.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="recording.json: .*; record it again") as error:
        load_recording(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_trace_is_one_line(golden, tmp_path):
    golden.save(tmp_path)
    (tmp_path / "trace").mkdir()
    with pytest.raises(ConfigError, match="embed_tokens.safetensors: missing; record it again"):
        compare_traces(golden, golden.trace, "float32")
    (tmp_path / "trace" / "embed_tokens.safetensors").write_bytes(b"{}")
    with pytest.raises(ConfigError, match="embed_tokens.safetensors: cannot be read"):
        compare_traces(golden, golden.trace, "float32")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"neuron_config": 5}'])
def test_a_damaged_compiled_folder_is_one_line(golden, tmp_path, capsys, content):
    golden.save(tmp_path / "golden")
    (tmp_path / "neuron_config.json").write_text(content)
    assert main(["compare", str(tmp_path / "golden"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "neuron_config.json: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{golden}", "{tmp}/nowhere"], "nowhere/config.json: no such file"),
        (["{tmp}/nowhere", "{golden}"], "nowhere/recording.json: no such file; give a folder that golden"),
        (["{golden}", "{model}"], "vocab_size is 64 in the golden outputs and 258 in the run: another model"),
        (["{golden}", "{golden}", "--gates", "{tmp}/nowhere"], "nowhere: cannot be read as JSON"),
        (["{golden}", "{golden}", "--out", "{golden}/recording.json"], "recording.json: cannot be created"),
    ],
)
def test_bad_arguments_are_one_line(golden, tmp_path, capsys, arguments, message):
    golden.save(tmp_path / "golden")
    write_checkpoint(tmp_path / "model", DEMO_CONFIG | {"vocab_size": 258})
    places = {"golden": tmp_path / "golden", "model": tmp_path / "model", "tmp": tmp_path}
    assert main(["compare", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


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
