"""Compares a run of the model with golden outputs, and says what that means."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from .bisect import Findings
from .gates import failed_gates
from .metrics import pearson, token_metrics
from .nxdi_rule import Verdict, judge
from .recording import Recording
from .rounding import coarser, tie_margin


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
    """metrics: name -> value, None where not measured; names as in gates.py, and counts. failures: gate -> why.
    findings: of the traces, None where they were not compared."""

    golden: Recording
    run: Recording
    prompts: list[Prompt]
    metrics: dict[str, float | None]
    gates: dict[str, float]
    findings: Findings | None = None
    failures: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.failures = failed_gates(self.metrics, self.gates)
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

    Where the run has other tokens than golden, it is compared up to the first one. Raises ConfigError for recordings of
    different models or prompts.
    """
    _check_same(golden, run)
    prompts = [_compare_prompt(golden, run, i) for i in range(len(golden.entries))]
    metrics = _metrics(prompts) | _decode_prefill(run, prefilled)
    return Comparison(golden, run, prompts, metrics, gates, findings)


def _check_same(golden: Recording, run: Recording) -> None:
    for name, size in golden.dimensions.items():
        if run.dimensions[name] != size:
            raise ConfigError(f"{name} is {size} in the golden outputs and {run.dimensions[name]} in the run")
    if [entry.prompt for entry in golden.entries] != [entry.prompt for entry in run.entries]:
        raise ConfigError("the run has other prompts than the golden outputs; record it with the same ones")


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
