"""Where an error starts: the first stage and point of two traces that are further apart than rounding."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from .metrics import row_errors
from .recording import Entry, Recording, stages
from .rounding import TRACE_MARGIN, relative_error
from .trace import POINTS

_ROUTER = "mlp.router.weights"


@dataclass
class Flip:
    """A token for which other experts were chosen. margin: by how much golden's biased scores prefer its own choice."""

    stage: str
    prompt: int
    position: int
    golden: list[int]
    ours: list[int]
    margin: float
    is_tie: bool

    def __str__(self) -> str:
        kind = "a tie" if self.is_tie else "not a tie"
        return (
            f"{self.stage}: prompt {self.prompt}, position {self.position}: experts {self.ours} instead of "
            f"{self.golden} (margin {self.margin:.1e}, {kind})"
        )


@dataclass
class Origin:
    """The first point out of tolerance, at its worst prompt and position. experts: those that all bad tokens chose and
    no good one did, where the point is the experts' output."""

    stage: str
    point: str
    prompt: int
    position: int
    error: float
    tolerance: float
    tokens: int
    experts: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.stage if self.stage in ("embed_tokens", "norm") else f"{self.stage}.{self.point}"

    def __str__(self) -> str:
        which = f"; only tokens of expert {', '.join(map(str, self.experts))}" if self.experts else ""
        return (
            f"{self.name} ({POINTS[self.point]}): relative error {self.error:.1e} exceeds {self.tolerance:.1e} for "
            f"{self.tokens} tokens, worst at prompt {self.prompt}, position {self.position}{which}"
        )


@dataclass
class Findings:
    """origin: None where the traces agree. growth: the worst relative error of each stage's output."""

    origin: Origin | None = None
    flips: list[Flip] = field(default_factory=list)
    growth: list[tuple[str, float]] = field(default_factory=list)


def compare_traces(golden: Recording, ours: Callable[[str], dict[str, Tensor]], dtype: str) -> Findings:
    """golden: a recording with a trace; ours: gives `i.POINT` -> [S, width] for a stage; dtype: the coarser of the two.
    Raises ConfigError where ours has other positions or modules."""
    findings, hidden = Findings(), golden.dimensions["hidden_size"]
    for number, stage in enumerate(stages(golden.dimensions)):
        expected, actual = golden.trace(stage), ours(stage)
        _check_same(stage, expected, actual)
        tolerance = TRACE_MARGIN * relative_error(dtype, number, hidden)
        errors = {
            point: {i: row_errors(expected[f"{i}.{point}"], actual[f"{i}.{point}"]) for i in _prompts(golden)}
            for point in POINTS
            if f"0.{point}" in expected
        }
        if f"0.{_ROUTER}" in expected:
            findings.flips += _flips(stage, golden.entries, expected, actual, tolerance)
        if findings.origin is None:
            findings.origin = _first_origin(stage, errors, tolerance, expected)
        last = list(errors.values())[-1]
        findings.growth.append((stage, max(float(rows.max()) for rows in last.values())))
    return findings


def _check_same(stage: str, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in actual or actual[name].shape != tensor.shape:
            what = list(actual[name].shape) if name in actual else "missing"
            raise ConfigError(
                f"trace of {stage}: {name}: {what}, golden has {list(tensor.shape)}; were the tokens others?"
            )


def _prompts(golden: Recording) -> range:
    return range(len(golden.entries))


def _first_origin(
    stage: str, errors: dict[str, dict[int, Tensor]], tolerance: float, expected: dict[str, Tensor]
) -> Origin | None:
    for point, by_prompt in errors.items():
        prompt = max(by_prompt, key=lambda i: float(by_prompt[i].max()))
        worst = float(by_prompt[prompt].max())
        if worst > tolerance:
            position = int(by_prompt[prompt].argmax())
            tokens = sum(int((rows > tolerance).sum()) for rows in by_prompt.values())
            experts = _suspects(by_prompt, tolerance, expected) if point == "mlp.experts" else []
            return Origin(stage, point, prompt, position, worst, tolerance, tokens, experts)
    return None


def _suspects(errors: dict[int, Tensor], tolerance: float, expected: dict[str, Tensor]) -> list[int]:
    bad = torch.cat([rows > tolerance for rows in errors.values()])
    chosen = torch.cat([expected[f"{i}.{_ROUTER}"] != 0 for i in errors])
    return (chosen[bad].all(0) & ~chosen[~bad].any(0)).nonzero().flatten().tolist()


def _flips(
    stage: str, entries: list[Entry], expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float
) -> list[Flip]:
    flips = []
    for i in range(len(entries)):
        golden, ours = (trace[f"{i}.{_ROUTER}"] != 0 for trace in (expected, actual))
        scores = expected[f"{i}.mlp.router.scores"]
        for position in (golden != ours).any(-1).nonzero().flatten().tolist():
            dropped, taken = golden[position] & ~ours[position], ours[position] & ~golden[position]
            row = scores[position]
            margin = float(row[dropped].max() - row[taken].min()) if dropped.any() and taken.any() else float("inf")
            sets = (chosen[position].nonzero().flatten().tolist() for chosen in (golden, ours))
            flips.append(Flip(stage, i, position, *sets, margin, abs(margin) <= tolerance * float(row.abs().max())))
    return flips
