"""What FP8 experts cost in accuracy: perplexity of the shipped model on its held-out excerpt, by form and dtype.

The figures of docs/fp8.md: `pytest -rP test/unit/test_fp8_accuracy.py`.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from nxdi_deepseek.tiny_model import TINY_MODEL_DIR
from support.models import load_model

from tools.train_tiny.evaluate import WINDOW, excerpt_stream
from tools.train_tiny.train import heldout_windows

_BATCH = 5


@functools.cache
@torch.no_grad()
def perplexity(weights, dtype):
    model = load_model(TINY_MODEL_DIR, batch_size=_BATCH, seq_len=WINDOW, weights=weights, torch_dtype=dtype)
    hidden = []
    model.model.norm.register_forward_hook(lambda _, args, output: hidden.append(output))
    losses = []
    for windows in heldout_windows(excerpt_stream(TINY_MODEL_DIR), WINDOW).split(_BATCH):
        model.reset()
        inputs = windows[:, :-2]
        model(input_ids=inputs, position_ids=torch.arange(WINDOW).expand_as(inputs))
        logits = model.model.lm_head(hidden.pop()).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:-1].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weights", "bound"), [("fp8", 0.005), ("fp8-block", 0.001)])
def test_perplexity_stays_within_its_bound(weights, bound, dtype):
    plain, quantized = perplexity("bf16", dtype), perplexity(weights, dtype)
    print(f"{weights} {dtype}: {quantized:.4f}, bf16 {plain:.4f}, {quantized / plain - 1:+.4%}")
    assert abs(quantized / plain - 1) <= bound
