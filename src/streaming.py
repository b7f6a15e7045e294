"""Prints generated tokens as they come, for one prompt or a batch."""

import sys
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


class BatchStreamer(BaseStreamer):
    """Calls `on_tokens` with the newest token of every sequence; transformers' own streamers take one sequence only.

    GenerationMixin first puts the prompts [B, S], then one token per sequence [B].
    """

    def __init__(self, batch: int, on_tokens: Callable[[list[int] | None], None]):
        self.batch, self.on_tokens = batch, on_tokens
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.on_tokens(value.flatten().tolist())
        self.prompt_seen = True

    def end(self) -> None:
        self.on_tokens(None)


class TextPrinter:
    """Prints the first sequence while it grows and the others when all are done; ids where there is no tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, batch: int):
        self.tokenizer = tokenizer
        self.sequences: list[list[int]] = [[] for _ in range(batch)]
        self.printed = 0

    def __call__(self, tokens: list[int] | None) -> None:
        if tokens is not None:
            for sequence, token in zip(self.sequences, tokens, strict=True):
                sequence.append(token)
        done = tokens is None
        text = self._text(self.sequences[0])
        # A character may need several tokens: its first ones decode to the replacement character.
        if done or not text.endswith("\ufffd"):
            if self.printed == 0 and len(self.sequences) > 1:
                sys.stdout.write("[0] ")
            sys.stdout.write(text[self.printed :])
            self.printed = len(text)
        if done:
            rest = (f"[{i}] {self._text(tokens)}" for i, tokens in enumerate(self.sequences[1:], start=1))
            sys.stdout.write("\n" + "".join(f"{line}\n" for line in rest))
        sys.stdout.flush()

    def _text(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return "".join(f"{token} " for token in tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
