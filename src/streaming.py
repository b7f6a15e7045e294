"""Prints generated tokens as they come, for one prompt or a batch."""

import sys
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


class BatchStreamer(BaseStreamer):
    """Calls `on_tokens` with the newest token of every sequence, and with None at the end; transformers' own streamers
    take one sequence only.

    GenerationMixin first puts the prompts [B, S], then one token per sequence [B].
    """

    def __init__(self, on_tokens: Callable[[list[int] | None], None]):
        self.on_tokens = on_tokens
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.on_tokens(value.flatten().tolist())
        self.prompt_seen = True

    def end(self) -> None:
        self.on_tokens(None)


class TextPrinter:
    """Prints the first sequence while it grows and the others when all are done; ids where there is no tokenizer.

    prompts: printed in front of the sequences; numbers of the sequences if not given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, batch: int, prompts: list[str] | None = None):
        self.tokenizer = tokenizer
        self.sequences: list[list[int]] = [[] for _ in range(batch)]
        self.prefixes = prompts or ([f"[{i}] " for i in range(batch)] if batch > 1 else [""])
        self.printed = ""

    def __call__(self, tokens: list[int] | None) -> None:
        for sequence, token in zip(self.sequences, tokens or [], strict=False):
            sequence.append(token)
        lines = [prefix + self._text(sequence) for prefix, sequence in zip(self.prefixes, self.sequences, strict=True)]
        done = tokens is None
        # A character may need several tokens: its first ones decode to the replacement character.
        if done or not lines[0].endswith("\ufffd"):
            sys.stdout.write(lines[0][len(self.printed) :])
            self.printed = lines[0]
        if done:
            sys.stdout.write("".join(f"\n{line}" for line in lines[1:]) + "\n")
        sys.stdout.flush()

    def _text(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return "".join(f"{token} " for token in tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
