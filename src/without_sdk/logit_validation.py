"""Stands for torch_neuronx.testing.validation, which NxDI's accuracy checks call: NxDI's own open copy of it."""

from types import SimpleNamespace

import torch


def neuron_allclose(actual, expected, rtol, atol):
    """As torch.allclose, but the relative tolerance is of the largest expected magnitude."""
    error = ((actual - expected).abs() - atol).max() / expected.abs().max()
    return SimpleNamespace(allclose=bool(error <= rtol), max_rel_error=error.item())


def logit_validation(input_ids, generate_fn, expected_logits, tol_map=None, divergence_difference_tol=None):
    """(passed, results, message) of comparing logits [T, B, V], teacher-forced from every divergence on."""
    from neuronx_distributed_inference.experimental.core.accuracy.logit_validation import logit_validation

    def generate(token_ids):
        return generate_fn(torch.tensor(token_ids))

    passed = logit_validation(input_ids.tolist(), generate, expected_logits, tol_map, divergence_difference_tol)
    return passed, None, f"logit validation {'passed' if passed else 'failed'}"
