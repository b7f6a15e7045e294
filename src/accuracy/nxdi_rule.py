"""The verdict of NxDI's logit matching on one token, computed as NxDI does (its logit_validation.py).

NxDI removes the constant by which our logits are shifted (the offset of a straight line fitted to ours over golden),
then bounds the largest difference among golden's k best logits, relative to the largest of these. Where the choices
differ, ours may prefer its token to golden's by the divergence tolerance at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# k -> (absolute, relative) tolerance
TOLERANCE_MAP = {"5": (1e-5, 0.01), "50": (1e-5, 0.02), "1000": (1e-5, 0.03), "all": (1e-5, 0.05)}
DIVERGENCE_TOLERANCE = 0.001


@dataclass(frozen=True)
class Verdict:
    """errors: relative, among the k best. divergence: by how much ours prefers another token, None if it agrees."""

    passed: bool
    errors: dict[str, float]
    divergence: float | None


def judge(golden_V: Tensor, ours_V: Tensor) -> Verdict:
    """golden_V, ours_V: float32 logits of one position, -inf where a token is ruled out. NxDI itself cannot take
    vocabularies below 1000 tokens; here k is at most the vocabulary."""
    allowed = ~(golden_V.isneginf() | ours_V.isneginf())
    golden, ours = golden_V[allowed].double(), ours_V[allowed].double()
    ours = ours - _shift(golden, ours)
    errors = {k: _error(golden, ours, k, atol) for k, (atol, _) in TOLERANCE_MAP.items()}
    passed = all(errors[k] <= rtol for k, (_, rtol) in TOLERANCE_MAP.items())
    choice = golden.argmax()
    if choice == ours.argmax():
        return Verdict(passed, errors, None)
    divergence = float(ours.max() - ours[choice])
    return Verdict(passed and divergence < DIVERGENCE_TOLERANCE, errors, divergence)


def _shift(golden: Tensor, ours: Tensor) -> Tensor:
    """The offset of the least-squares line ours = slope * golden + offset."""
    centred = golden - golden.mean()
    slope = centred @ (ours - ours.mean()) / centred.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return ours.mean() - slope * golden.mean()


def _error(golden: Tensor, ours: Tensor, k: str, atol: float) -> float:
    if k != "all":
        best = golden.topk(min(int(k), len(golden)))
        golden, ours = best.values, ours[best.indices]
    return float((((ours - golden).abs() - atol).max() / golden.abs().max()).clamp(min=0))
