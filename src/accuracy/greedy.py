"""Greedy choice of tokens, and its verification several tokens at a time.

A draft is checked as in speculative decoding (Leviathan et al., arXiv:2211.17192) with a greedy target: one pass over
all of its tokens gives the choice after each, and the draft holds as far as the choices agree with it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen: the likeliest, no stop token among the first min_new_tokens, at most max_new_tokens."""

    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0

    def scores(self, logits: Tensor, step: int) -> Tensor:
        """The logits [vocab] that decide on the new token number `step`, from 0 on."""
        if step >= self.min_new_tokens or not self.stop_tokens:
            return logits
        return logits.index_fill(-1, torch.tensor(self.stop_tokens, device=logits.device), float("-inf"))

    def choose(self, logits: Tensor, step: int) -> int:
        return int(self.scores(logits, step).argmax())

    def is_done(self, tokens: list[int]) -> bool:
        return len(tokens) >= self.max_new_tokens or (bool(tokens) and tokens[-1] in self.stop_tokens)


@dataclass
class Sequence:
    """A prompt, the tokens chosen so far, a guess of those that follow, and how many positions are in the cache."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    cached: int = 0

    def new_tokens(self, rule: Rule) -> list[int]:
        """What the next pass must run: known tokens that are not cached, then as much of the draft as can be used."""
        room = rule.max_new_tokens - len(self.tokens) - 1
        return (self.prompt + self.tokens)[self.cached :] + self.draft[: max(room, 0)]

    def advance(self, logits: Tensor, rule: Rule) -> int:
        """Takes the tokens that logits [1 + drafted, vocab] choose, after the newest known token and each drafted one.

        Returns their number. The rest of the draft stays: after a token that differs it often goes on the same.
        """
        known = len(self.prompt) + len(self.tokens)
        taken = 0
        for row in logits:
            token = rule.choose(row, len(self.tokens))
            guess = self.draft.pop(0) if self.draft else None
            self.tokens.append(token)
            taken += 1
            if token != guess or rule.is_done(self.tokens):
                break
        self.cached = known + taken - 1
        return taken
