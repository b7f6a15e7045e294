"""Graphs with and without torch_xla's functionalization. The other modules of this folder run without, as torch-neuronx
does unless a user sets XLA_DISABLE_FUNCTIONALIZATION=0, which its release notes recommend to some."""

import os
import subprocess
import sys
from pathlib import Path

import torch

DEGREES = Path(__file__).with_name("test_degrees.py")
CASES = "test_the_expert_kernel_equals_hugging_face or (test_all_ranks and 4 and not 64)"


def test_tensors_are_cut_where_torch_neuronx_cuts_them_wrong():
    """Were this Tensor.split right, the suites would no longer tell a model that uses it."""
    x = torch.arange(12.0).view(3, 4)
    assert not torch.equal(x.to("xla").split((3, 1), -1)[0].cpu(), x[:, :3])
    assert torch.equal(x.to("xla").tensor_split((3,), -1)[0].cpu(), x[:, :3])


def test_graphs_are_right_with_functionalization():
    command = [sys.executable, "-m", "pytest", "-q", str(DEGREES), "-k", CASES]
    environment = os.environ | {"XLA_DISABLE_FUNCTIONALIZATION": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:]
