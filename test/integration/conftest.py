"""The integration tests run on NxDI; a process has one backend, so they need one of their own."""

import sys

import pytest
from nxdi_deepseek.without_sdk.nxdi_source import NxDINotFound, find_nxdi

if "nxdi_deepseek.backend" in sys.modules:
    raise pytest.UsageError("run `pytest test/unit` and `pytest test/integration` in two processes")


@pytest.fixture(autouse=True, scope="module")
def end_process_groups():
    """NxDI makes groups for every model; gloo's threads of some thousand idle ones would keep a core busy."""
    yield
    if "neuronx_distributed" in sys.modules:
        import torch
        from neuronx_distributed.parallel_layers import parallel_state

        if torch.distributed.is_initialized():
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def pytest_sessionfinish(session, exitstatus):
    """Without NxDI every module is skipped, which pytest takes for a mistake."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        try:
            find_nxdi()
        except NxDINotFound:
            session.exitstatus = pytest.ExitCode.OK
