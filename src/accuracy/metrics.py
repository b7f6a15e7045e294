"""Measures of how far logits are from golden ones. Shape suffixes: T tokens, V vocabulary."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
