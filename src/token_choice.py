"""Which token follows: drafts and their verification, greedy or sampled, with transformers' logits processors.

Sampling is that of Leviathan et al. (arXiv:2211.17192, algorithm 1): a token drawn from the draft's distribution q is
kept with probability min(1, p/q); the first one that is not is drawn anew from max(0, p - q), normalised. The tokens
are distributed as if drawn from the model's own distribution p. A greedy draft is kept if it is the model's choice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class TokenChoice:
    """processors: what is applied to logits, called as processor(tokens so far [B, n], logits [B, vocab]). batch: B."""

    def __init__(self, processors: Sequence[Callable[[Tensor, Tensor], Tensor]], do_sample: bool, batch: int = 1):
        self._processors, self._do_sample, self._batch = list(processors), do_sample, batch

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self._processors and not self._do_sample

    def draft(self, known: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """One token of each row [B] from logits [B, vocab], and the distribution that it is from (None if greedy).
        known: the tokens ahead of it."""
        scores = self._processed(known, logits)
        if not self._do_sample:
            return scores.argmax(-1), None
        probabilities = scores.softmax(-1)
        return _drawn(probabilities), probabilities

    def verify(
        self, known: list[Tensor], drafted: Tensor, drafts: Sequence[Tensor | None], logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the model makes of drafted tokens [B, K]: tokens [B, K + 1], and how many drafts lead them, [B]. Those
        behind the first that is not a draft mean nothing.

        drafts: the distribution [B, vocab] of each draft. logits [B, K + 1, vocab] of the model, the first ahead of the
        first draft.
        """
        steps = range(logits.shape[1])
        ahead = [[torch.cat((row, drafted[i, :step])) for i, row in enumerate(known)] for step in steps]
        scores = [self._processed(ahead[step], logits[:, step]) for step in steps]
        if self._do_sample:
            return self._sampled(drafted, drafts, [score.softmax(-1) for score in scores])
        chosen = torch.stack([score.argmax(-1) for score in scores], dim=1)
        return chosen, _leading(chosen[:, :-1] == drafted)

    def _sampled(self, drafted: Tensor, drafts: Sequence[Tensor], target: list[Tensor]) -> tuple[Tensor, Tensor]:
        kept, chosen = [], []
        for step, (q, p) in enumerate(zip(drafts, target, strict=False)):
            token = drafted[:, step : step + 1]
            keeps = torch.rand(token.shape, device=token.device) * q.gather(1, token) < p.gather(1, token)
            rest = (p - q).clamp(min=0)
            # Where p is q, nothing is refused; rounding may leave no rest.
            anew = _drawn(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))
            kept.append(keeps)
            chosen.append(torch.where(keeps[:, 0], token[:, 0], anew))
        chosen.append(_drawn(target[-1]))
        return torch.stack(chosen, dim=1), _leading(torch.cat(kept, dim=1))

    def _processed(self, known: list[Tensor], logits: Tensor) -> Tensor:
        if not self._processors:
            return logits
        return torch.stack([self._row(i, tokens, logits[i]) for i, tokens in enumerate(known)])

    def _row(self, i: int, tokens: Tensor, scores: Tensor) -> Tensor:
        """Scores [vocab] of row i of the batch. Rows differ in length and processors may keep something for each, so
        that a batch is made of the one."""
        tokens, scores = (tensor.expand(self._batch, -1) for tensor in (tokens, scores))
        for process in self._processors:
            scores = process(tokens, scores)
        return scores[i]


def _drawn(weights: Tensor) -> Tensor:
    return torch.multinomial(weights, 1)[:, 0]


def _leading(right: Tensor) -> Tensor:
    """How many of bool [B, K] are true ahead of the first that is not."""
    return right.to(torch.int64).cumprod(-1).sum(-1)
