"""Compares a run of the model with golden outputs, and judges the result by gates.

A gates file is JSON with names of metrics and a bound for each: {"top1_agreement": 0.95, "kl_max": 0.1}
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from .metrics import Verdict, coarser, judge, pearson, tie_margin, token_metrics
from .recording import Recording
from .tracing import Findings

# Metric -> whether the bound is the least ("min") or the most ("max") that passes.
DIRECTIONS = {
    "top1_exact": "min",
    "top1_agreement": "min",
    "top5_agreement": "min",
    "max_difference": "max",
    "mean_difference": "max",
    "kl_mean": "max",
    "kl_max": "max",
    "pearson": "min",
    "nxdi_passed": "min",
    "decode_prefill_top1": "min",
    "decode_prefill_max_difference": "max",
}

# Without a gates file. float32: rounding, with a factor of some tens; choices may differ in ties only. bfloat16: at
# most one token in ten differs (TT-Metal's gate for DeepSeek-V3), KL as MaxText bounds it for the 671B model.
DEFAULTS = {
    "float32": {
        "top1_agreement": 1.0,
        "top5_agreement": 1.0,
        "max_difference": 1e-3,
        "kl_max": 1e-6,
        "pearson": 0.99999,
        "nxdi_passed": 1.0,
        "decode_prefill_top1": 1.0,
        "decode_prefill_max_difference": 1e-3,
    },
    "bfloat16": {"top1_exact": 0.9, "top5_agreement": 0.98, "kl_mean": 0.1, "decode_prefill_top1": 0.9},
}


_LARGEST_BOUND = 1e30
_SAME_PROMPTS = "record it with the same ones"


@dataclass
class FreeRun:
    """How far the model's own greedy tokens equal golden's, and the golden margin where they part (None: nowhere)."""

    length: int
    of: int
    margin: float | None
    is_tie: bool


@dataclass
class Prompt:
    """The comparison of one prompt. tokens: see metrics.token_metrics, and `tie`: True where rounding decides."""

    golden: Tensor
    ours: Tensor
    tokens: dict[str, Tensor]
    verdicts: list[Verdict]
    free_run: FreeRun | None


@dataclass
class Comparison:
    """metrics: name -> value, None where not measured; names as in DIRECTIONS, and counts. failures: gate -> why.
    lengths: where the run is not as long as golden, a line each. findings: of the traces, None where they were not
    compared."""

    golden: Recording
    run: Recording
    prompts: list[Prompt]
    metrics: dict[str, float | None]
    gates: dict[str, float]
    lengths: list[str] = field(default_factory=list)
    findings: Findings | None = None
    failures: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.failures = failed_gates(self.metrics, self.gates)
        if self.lengths:
            self.failures["length"] = "; ".join(self.lengths)
        if self.findings and self.findings.origin:
            self.failures["trace"] = str(self.findings.origin)

    @property
    def passed(self) -> bool:
        return not self.failures


def compare(
    golden: Recording,
    run: Recording,
    gates: dict[str, float],
    prefilled: list[Tensor] | None = None,
    findings: Findings | None = None,
) -> Comparison:
    """prefilled: what the same model gives for the same tokens without decoding, float32 [T, vocab] for each prompt.

    Where the run has other tokens than golden, it is compared up to the first one; with more or fewer tokens it fails.
    Raises ConfigError for recordings of different models or prompts.
    """
    check_same_model(golden, run.dimensions)
    _check_same_prompts(golden, run)
    prompts = [_compare_prompt(golden, run, i) for i in range(len(golden.entries))]
    metrics = _metrics(prompts) | _decode_prefill(run, prefilled)
    return Comparison(golden, run, prompts, metrics, gates, list(_lengths(golden, run)), findings)


def check_same_model(golden: Recording, dimensions: dict[str, int]) -> None:
    """Raises ConfigError where a run of a model of these dimensions cannot be compared with golden."""
    for name, size in golden.dimensions.items():
        if dimensions.get(name) != size:
            raise ConfigError(
                f"{name} is {size} in the golden outputs and {dimensions.get(name)} in the run: another model; compare "
                "with the outputs of the same checkpoint"
            )


def _check_same_prompts(golden: Recording, run: Recording) -> None:
    counts = len(golden.entries), len(run.entries)
    if counts[0] != counts[1]:
        raise ConfigError(f"the golden outputs have {counts[0]} prompts and the run {counts[1]}; {_SAME_PROMPTS}")
    if [entry.prompt for entry in golden.entries] != [entry.prompt for entry in run.entries]:
        raise ConfigError(f"the run has other prompts than the golden outputs; {_SAME_PROMPTS}")


def _lengths(golden: Recording, run: Recording) -> Iterator[str]:
    """A line for each prompt after which the run is not as long as golden: what is missing was never compared."""
    for i, (entry, other) in enumerate(zip(golden.entries, run.entries, strict=True)):
        own = entry.tokens if other.own_tokens is None else other.own_tokens
        if len(other.tokens) != len(entry.tokens):
            yield f"prompt {i}: the run has {len(other.tokens)} tokens and golden {len(entry.tokens)}"
        elif len(own) != len(entry.tokens) and _common(own, entry.tokens) == min(len(own), len(entry.tokens)):
            yield f"prompt {i}: the free run ends after {len(own)} tokens and golden after {len(entry.tokens)}"


def _compare_prompt(golden: Recording, run: Recording, index: int) -> Prompt:
    entry, other = golden.entries[index], run.entries[index]
    length = _common(entry.tokens, other.tokens)
    length = min(length + 1, len(entry.tokens), len(other.tokens))
    golden_TV, ours_TV = golden.logits[index][:length], run.logits[index][:length]
    if not ours_TV.isfinite().all():
        raise ConfigError(f"prompt {index}: the run's logits hold NaN or infinity; nothing to compare")
    tokens = token_metrics(golden_TV, ours_TV)
    tokens["tie"] = tokens["margin"] <= _tie_margin(golden, run.dtype, golden_TV)
    verdicts = [judge(*rows) for rows in zip(golden_TV, ours_TV, strict=True)]
    own = other.tokens if other.own_tokens is None else other.own_tokens
    return Prompt(golden_TV, ours_TV, tokens, verdicts, _free_run(golden, run, index, own))


def _free_run(golden: Recording, run: Recording, index: int, own: list[int]) -> FreeRun:
    tokens = golden.entries[index].tokens
    length = _common(tokens, own)
    if length >= min(len(tokens), len(own)):
        return FreeRun(length, len(tokens), None, False)
    row = golden.logits[index][length]
    # Against the token that was chosen instead, not just the second best.
    margin = float(row[tokens[length]] - row[own[length]])
    return FreeRun(length, len(tokens), margin, margin <= float(_tie_margin(golden, run.dtype, row)))


def _tie_margin(golden: Recording, dtype: str, logits: Tensor) -> Tensor:
    sizes = golden.dimensions
    return tie_margin(coarser(golden.dtype, dtype), sizes["num_hidden_layers"], sizes["hidden_size"], logits)


def _common(first: list[int], second: list[int]) -> int:
    """The length of the common start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _metrics(prompts: list[Prompt]) -> dict[str, float | None]:
    tokens = {name: torch.cat([prompt.tokens[name] for prompt in prompts]) for name in prompts[0].tokens}
    verdicts = [verdict for prompt in prompts for verdict in prompt.verdicts]
    return {
        "tokens": len(verdicts),
        "ties": int((tokens["tie"] & ~tokens["top1"]).sum()),
        "top1_exact": _share(tokens["top1"]),
        "top1_agreement": _share(tokens["top1"] | tokens["tie"]),
        "top5_agreement": _share(tokens["top5"]),
        "mean_difference": float(tokens["mean_difference"].mean()),
        "max_difference": float(tokens["max_difference"].max()),
        "kl_mean": float(tokens["kl"].mean()),
        "kl_max": float(tokens["kl"].max()),
        "pearson": pearson(torch.cat([p.golden for p in prompts]), torch.cat([p.ours for p in prompts])),
        "nxdi_passed": sum(verdict.passed for verdict in verdicts) / len(verdicts),
    }


def _decode_prefill(run: Recording, prefilled: list[Tensor] | None) -> dict[str, float | None]:
    """Agreement of the run's decoding steps with whole prompts, judged like golden against ours."""
    if prefilled is None:
        return {"decode_prefill_top1": None, "decode_prefill_max_difference": None}
    by_prompt = [token_metrics(whole, decoded) for whole, decoded in zip(prefilled, run.logits, strict=True)]
    agree = torch.cat(
        [
            tokens["top1"] | (tokens["margin"] <= _tie_margin(run, run.dtype, whole))
            for tokens, whole in zip(by_prompt, prefilled, strict=True)
        ]
    )
    worst = max(float(tokens["max_difference"].max()) for tokens in by_prompt)
    return {"decode_prefill_top1": _share(agree), "decode_prefill_max_difference": worst}


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def read_gates(path: str | Path) -> dict[str, float]:
    """Raises ConfigError for a file that is no JSON object of known names and numbers."""
    try:
        gates = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(gates, dict):
        raise ConfigError(f'{path}: holds no JSON object; write {{"top1_agreement": 0.95}}')
    if not gates:
        raise ConfigError(f"{path}: holds no gate; the gates are {', '.join(DIRECTIONS)}")
    for name, bound in gates.items():
        if name not in DIRECTIONS:
            raise ConfigError(f"{path}: {name} is no gate; the gates are {', '.join(DIRECTIONS)}")
        # false for NaN and infinity too
        if isinstance(bound, bool) or not (isinstance(bound, int | float) and abs(bound) < _LARGEST_BOUND):
            raise ConfigError(f"{path}: {name}: {bound!r} must be a number")
    return gates


def failed_gates(metrics: dict[str, float | None], gates: dict[str, float]) -> dict[str, str]:
    """Gate -> why it fails, for those that do. NaN fails every gate; what was not measured (None) fails none."""
    failed = {}
    for name, bound in gates.items():
        value = metrics[name]
        if value is None:
            continue
        if not (value >= bound if DIRECTIONS[name] == "min" else value <= bound):
            failed[name] = f"{value:.3g} {'below' if DIRECTIONS[name] == 'min' else 'above'} {bound:g}"
    return failed
