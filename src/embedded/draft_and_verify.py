"""Speculative decoding on the embedded runtime: the MTP layer drafts, one run of the model verifies.

A step costs one run of the model on all drafted tokens, one of the draft on what the model made of them, which also
gives the hidden state that the next step drafts from, and one of the draft for each further token drafted.
"""

from typing import Any

import torch
from torch import Tensor

from ..token_choice import TokenChoice
from .model_base import bucket_of


class DraftAndVerify:
    """Sequences in the first cache slots of a model, each at its own length. choice: what becomes of logits."""

    def __init__(self, model: Any, choice: TokenChoice):
        self._model, self._target, self._draft, self._choice = model, model.model, model.draft_model, choice
        self.drafted = model.neuron_config.speculation_length - 1

    def start(self, input_ids: Tensor, attention_mask: Tensor, known: list[Tensor]) -> Tensor:
        """Takes right-padded prompts [B, S]; returns the first token of each, [B]. known: the tokens of each row."""
        mask = attention_mask.to(torch.bool)
        self._slots, self._rows = slice(0, len(input_ids)), torch.arange(len(input_ids), device=input_ids.device)
        positions = torch.where(mask, mask.cumsum(-1) - 1, -1)
        last = mask.sum(-1) - 1
        hidden = self._target.hidden_states(input_ids, mask, positions, self._slots, True)
        first, _ = self._choice.draft(known, self._logits(hidden[self._rows, last]))
        following = input_ids.roll(-1, dims=1)
        following[self._rows, last] = first
        drafted_from = self._draft.hidden_states(following, mask, positions, self._slots, True, hidden)
        self._hidden, self._last, self._position = drafted_from[self._rows, last], first, last + 1
        self._model.kv_cache_populated = True
        return first

    def step(self, known: list[Tensor], frozen: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, drafted + 1] behind each sequence, and how many of them are accepted drafts, [B]; one more is the
        model's own. known: the tokens of each row. Sequences that are `frozen` [B] stay where they are."""
        tokens, probabilities = self._drafts(known)
        start = self._position[:, None] + torch.arange(self.drafted + 1, device=tokens.device)
        candidates = torch.cat((self._last[:, None], tokens), dim=1)
        hidden = self._run(self._target, candidates, start)
        chosen, accepted = self._choice.verify(known, tokens, probabilities, self._logits(hidden))
        drafted_from = self._run(self._draft, chosen, start, hidden)
        going = ~frozen
        self._hidden = torch.where(going[:, None], drafted_from[self._rows, accepted], self._hidden)
        self._last = torch.where(going, chosen[self._rows, accepted], self._last)
        self._position = self._position + going * (accepted + 1)
        return chosen, accepted

    def _drafts(self, known: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Tokens [B, drafted] and the distributions that they were drawn from, [B, vocab] each, None if greedy."""
        hidden, tokens, probabilities = self._hidden, [], []
        while True:
            token, distribution = self._choice.draft(_longer(known, tokens), self._logits(hidden))
            tokens.append(token[:, None])
            probabilities.append(distribution)
            if len(tokens) == self.drafted:
                return torch.cat(tokens, dim=1), probabilities
            position = self._position[:, None] + len(tokens) - 1
            hidden = self._run(self._draft, tokens[-1], position, hidden[:, None])[:, 0]

    def _run(self, model: Any, tokens: Tensor, positions: Tensor, prev_hidden: Tensor | None = None) -> Tensor:
        """Hidden states of new tokens [B, S] at their positions, over what is cached ahead of each row's first."""
        first = positions[:, :1]
        length = bucket_of(int(positions.max()) + 1, self._model.neuron_config.decode_buckets())
        mask = torch.arange(length, device=tokens.device) < first
        return model.hidden_states(tokens, mask, positions, self._slots, False, prev_hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._target.lm_head(hidden).to(torch.float32)


def _longer(known: list[Tensor], drafted: list[Tensor]) -> list[Tensor]:
    """The tokens of each row with those drafted behind them."""
    return [torch.cat((row, *(token[i] for token in drafted))) for i, row in enumerate(known)] if drafted else known
