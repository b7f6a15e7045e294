"""How far logits are from golden ones, NxDI's own verdict on them, and how far rounding alone may take them.

Shape suffixes: T tokens, V vocabulary.

NxDI's verdict on one token is computed as its logit_validation.py does: it removes the constant by which our logits are
shifted (the offset of a straight line fitted to ours over golden), then bounds the largest difference among golden's k
best logits, relative to the largest of these. Where the choices differ, ours may prefer its token to golden's by the
divergence tolerance at most.

Rounding is the yardstick for ties and traces. Independent roundings add up like a random walk: after n of them the
relative error is about sqrt(n) * u, u the unit roundoff (Higham and Mary, "A new approach to probabilistic rounding
error analysis", 2019). A layer rounds what goes on to the next one about 4 times: after attention, after the MLP, and
at the two additions. In float32 every sum of K products adds its K roundings to these; in bfloat16 it does not, since
sums are kept in float32 and rounded once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# NxDI's: k -> (absolute, relative) tolerance among the k best logits
TOLERANCE_MAP = {"5": (1e-5, 0.01), "50": (1e-5, 0.02), "1000": (1e-5, 0.03), "all": (1e-5, 0.05)}
DIVERGENCE_TOLERANCE = 0.001

_ROUNDINGS_PER_LAYER = 4
_UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
# Times the expected error that a row of a trace may have: softmax and norms of single tokens amplify what they get. The
# right model reaches a third of it in float32, over the configurations of the parity tests, and two thirds in bfloat16.
TRACE_MARGIN = 16


def token_metrics(golden_TV: Tensor, ours_TV: Tensor) -> dict[str, Tensor]:
    """For each token, [T]: the two choices; whether they agree and whether ours is among golden's five best; the
    golden margin (best minus second logit); mean and max |difference|; KL(golden || ours) in nats."""
    golden_token, our_token = golden_TV.argmax(-1), ours_TV.argmax(-1)
    best = golden_TV.topk(5, dim=-1)
    difference = (ours_TV - golden_TV).abs()
    # float64: the divergences of good runs are far below what float32 sums leave of them.
    log_p, log_q = golden_TV.double().log_softmax(-1), ours_TV.double().log_softmax(-1)
    return {
        "golden_token": golden_token,
        "our_token": our_token,
        "top1": golden_token == our_token,
        "top5": (best.indices == our_token[:, None]).any(-1),
        "golden_logit": best.values[:, 0],
        "our_logit": ours_TV.gather(-1, golden_token[:, None])[:, 0],
        "margin": best.values[:, 0] - best.values[:, 1],
        "mean_difference": difference.mean(-1),
        "max_difference": difference.amax(-1),
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp(min=0),
    }


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of all pairs; 1 where both are constant."""
    x, y = x.double().flatten() - x.double().mean(), y.double().flatten() - y.double().mean()
    scale = x.norm() * y.norm()
    return 1.0 if scale == 0 else float(x @ y / scale)


def row_errors(golden: Tensor, ours: Tensor) -> Tensor:
    """|ours - golden| / |golden| of each row: [S, width] to [S]; infinity where only ours is not zero or not finite."""
    error = (ours - golden).norm(dim=-1)
    relative = torch.where(error == 0, 0.0, error / golden.norm(dim=-1))
    return relative.nan_to_num(nan=float("inf"), posinf=float("inf"))


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


def relative_error(dtype: str, layers: int, hidden_size: int) -> float:
    """Of hidden states or logits after `layers` layers, relative to their largest values."""
    roundings = _ROUNDINGS_PER_LAYER * max(layers, 1) * (hidden_size if dtype == "float32" else 1)
    return _UNIT_ROUNDOFF[dtype] * roundings**0.5


def tie_margin(dtype: str, layers: int, hidden_size: int, logits: Tensor) -> Tensor:
    """The distance [...] of two logits [..., vocab] below which rounding alone decides which is larger."""
    return 2**0.5 * relative_error(dtype, layers, hidden_size) * logits.abs().amax(-1)


def coarser(*dtypes: str) -> str:
    return max(dtypes, key=_UNIT_ROUNDOFF.__getitem__)
