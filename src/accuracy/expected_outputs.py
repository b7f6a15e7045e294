"""The file that NxDI's inference_demo takes as --expected-outputs-path."""

import os
from collections import OrderedDict
from pathlib import Path

import torch

from ..checkpoint.files import PARTIAL_SUFFIX
from .greedy import Rule
from .recording import Recording


def write_expected_outputs(recording: Recording, index: int, path: str | Path, batch_size: int = 1) -> None:
    """Writes one prompt's outputs in the form of Hugging Face's generate(return_dict_in_generate, output_scores).

    inference_demo repeats its first --prompt batch_size times, so the file does too: `sequences` int64 [B, S + T] for
    its token matching, `scores` a tuple of T tensors float32 [B, vocab] for its logit matching. Stop tokens that were
    ruled out have the score -inf, as generate gives them.
    The two are attributes of an OrderedDict: torch.load with weights_only, its default since torch 2.6, builds no class
    of transformers, but restores the attributes of this one.
    """
    entry = recording.entries[index]
    rule = Rule(len(entry.tokens), tuple(recording.stop_tokens), recording.min_new_tokens)
    outputs = OrderedDict()
    outputs.sequences = torch.tensor(entry.prompt + entry.tokens).repeat(batch_size, 1)
    rows = recording.logits[index]
    outputs.scores = tuple(rule.scores(row, step).expand(batch_size, -1) for step, row in enumerate(rows))
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        torch.save(outputs, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
