"""generate() with speculation: rows of a batch accept different numbers of tokens, and come out as plain ones would."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .errors import ConfigError


class Speculator(Protocol):
    """What runs the steps. drafted: tokens that a step drafts."""

    drafted: int

    def start(self, input_ids: Tensor, attention_mask: Tensor, known: list[Tensor]) -> Tensor:
        """Prompts [B, S]; the first token of each."""

    def step(self, known: list[Tensor], frozen: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, drafted + 1], and how many of them are drafts that were accepted, [B]."""


@dataclass
class SpeculationCounts:
    """Of one generation, summed over the sequences: steps behind the prompt while a sequence was unfinished, and what
    became of the tokens drafted in them."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_step(self) -> float:
        return 1 + self.accepted / self.steps if self.steps else 1.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


def check_room(mask: Tensor, new_tokens: int, drafted: int, seq_len: int) -> None:
    """Raises ConfigError where drafted tokens would lie beyond seq_len. mask [B, S] of the prompts."""
    needed = int(mask.sum(-1).max()) + new_tokens + drafted - 1
    if needed > seq_len:
        raise ConfigError(
            f"generate: prompt, new and drafted tokens need {needed} positions, seq_len is {seq_len}; raise it"
        )


def speculate(
    speculator: Speculator,
    input_ids: Tensor,
    attention_mask: Tensor,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
) -> tuple[Any, SpeculationCounts]:
    """As GenerationMixin._sample: prompts with their new tokens [B, S + new], finished rows filled with padding.

    The streamer gets a column once all rows have it. Scores are not kept.
    """
    if generation_config.output_scores or generation_config.output_logits:
        raise ConfigError(
            "generate: output_scores and output_logits are not supported with speculation; leave them out"
        )
    rows = _Rows(input_ids, generation_config)
    counts = SpeculationCounts()
    rows.append(speculator.start(input_ids, attention_mask, rows.known())[:, None], torch.zeros(len(input_ids)).long())
    while not rows.emit(stopping_criteria, streamer):
        frozen = rows.done()
        tokens, accepted = speculator.step(rows.known(), frozen)
        going = int((~frozen).sum())
        counts.steps += going
        counts.drafted += going * speculator.drafted
        counts.accepted += int(accepted[~frozen].sum())
        rows.append(tokens, accepted, frozen)
    if streamer is not None:
        streamer.end()
    sequences = rows.sequences
    if generation_config.return_dict_in_generate:
        sequences = GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences, counts


class _Rows:
    """The sequences of a batch, of uneven length, and the columns of them that are out. sequences: [B, S + out]."""

    def __init__(self, input_ids: Tensor, generation_config: Any):
        self.sequences, self._prompts = input_ids, input_ids
        self._new: list[list[int]] = [[] for _ in input_ids]
        self._most = generation_config.max_length - input_ids.shape[1]
        ends, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        self._ends = set() if ends is None else set(ends.tolist())
        self._pad = pad
        self._unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def known(self) -> list[Tensor]:
        """All tokens of each row."""
        device = self._prompts.device
        return [
            torch.cat((prompt, torch.tensor(new, dtype=torch.int64, device=device)))
            for prompt, new in zip(self._prompts, self._new, strict=True)
        ]

    def append(self, tokens: Tensor, accepted: Tensor, frozen: Tensor | None = None) -> None:
        for i, (row, count) in enumerate(zip(tokens.tolist(), accepted.tolist(), strict=True)):
            if frozen is None or not frozen[i]:
                self._new[i] += row[: count + 1]

    def done(self) -> Tensor:
        """Rows [B] that need no more tokens."""
        ended = [len(new) >= self._most or not self._ends.isdisjoint(new) for new in self._new]
        return torch.tensor(ended, device=self._prompts.device) | ~self._unfinished

    def emit(self, stopping_criteria: Any, streamer: Any) -> bool:
        """Puts out the columns that all unfinished rows have. Returns whether the generation is over."""
        while self._unfinished.any():
            column = self.sequences.shape[1] - self._prompts.shape[1]
            if any(len(new) <= column for new, going in zip(self._new, self._unfinished, strict=True) if going):
                return False
            tokens = torch.tensor([new[column] if column < len(new) else 0 for new in self._new])
            tokens = tokens.to(self._prompts.device)
            if self._ends:
                tokens = torch.where(self._unfinished, tokens, self._pad)
            self.sequences = torch.cat((self.sequences, tokens[:, None]), dim=1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            self._unfinished = self._unfinished & ~stopping_criteria(self.sequences, None)
        return True
