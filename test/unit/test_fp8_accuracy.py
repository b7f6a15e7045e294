"""What FP8 experts cost in accuracy, on the shipped model and its held-out excerpt: perplexity, and what each expert
layer gives, by form.

The figures of docs/fp8.md: `pytest -rP test/unit/test_fp8_accuracy.py`.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from nxdi_deepseek.tiny_model import TINY_MODEL_DIR
from support.models import load_model
from support.products import FastProducts

from tools.train_tiny.evaluate import WINDOW, excerpt_stream
from tools.train_tiny.train import heldout_windows

_BATCH = 5


@functools.cache
def load(weights, dtype):
    return load_model(TINY_MODEL_DIR, batch_size=_BATCH, seq_len=WINDOW, weights=weights, torch_dtype=dtype)


@functools.cache
@torch.no_grad()
def perplexity(weights, dtype):
    model = load(weights, dtype)
    hidden, losses = [], []
    hook = model.model.norm.register_forward_hook(lambda _, args, output: hidden.append(output))
    for windows in heldout_windows(excerpt_stream(TINY_MODEL_DIR), WINDOW).split(_BATCH):
        model.reset()
        inputs = windows[:, :-2]
        with FastProducts():
            model(input_ids=inputs, position_ids=torch.arange(WINDOW).expand_as(inputs))
            logits = model.model.lm_head(hidden.pop()).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:-1].flatten(), reduction="none"))
    hook.remove()
    return math.exp(torch.cat(losses).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weights", "bound"), [("fp8", 0.005), ("fp8-block", 0.001)])
def test_perplexity_stays_within_its_bound(weights, bound, dtype):
    plain, quantized = perplexity("bf16", dtype), perplexity(weights, dtype)
    print(f"{weights} {dtype}: {quantized:.4f}, bf16 {plain:.4f}, {quantized / plain - 1:+.4%}")
    assert abs(quantized / plain - 1) <= bound


@torch.no_grad()
def layer_errors(weights):
    """Relative error (Frobenius) of what each expert layer gives for the activations that it really gets."""
    plain, quantized, errors = load("bf16", torch.float32), load(weights, torch.float32), {}

    def compare(layer):
        def hook(_, args, output):
            other = quantized.model.layers[layer].mlp(*args)[0]
            errors[layer] = ((other - output[0]).norm() / output[0].norm()).item()

        return hook

    layers = [i for i, layer in enumerate(plain.model.layers) if layer.is_moe]
    hooks = [plain.model.layers[i].mlp.register_forward_hook(compare(i)) for i in layers]
    plain.reset()
    inputs = heldout_windows(excerpt_stream(TINY_MODEL_DIR), WINDOW)[:_BATCH, :-2]
    plain(input_ids=inputs, position_ids=torch.arange(WINDOW).expand_as(inputs))
    for hook in hooks:
        hook.remove()
    return errors


# A code has three bits of fraction: rounding is off by 2^-4 of the weight at most, 2^-4 / sqrt(3) in the mean square.
# The errors of gate, up and down are independent and add up in squares. In blocks only the smallest codes change.
@pytest.mark.parametrize(("weights", "bound"), [("fp8", 2**-4), ("fp8-block", 1e-5)])
def test_each_expert_layer_stays_within_the_error_of_its_weights(weights, bound):
    errors = layer_errors(weights)
    print(weights, {layer: f"{error:.2e}" for layer, error in errors.items()})
    assert len(errors) >= 2
    assert all(0 < error <= bound for error in errors.values())
