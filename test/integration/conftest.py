"""The integration tests run on NxDI; a process has one backend, so they need one of their own."""

import sys

import pytest
from nxdi_deepseek.without_sdk.nxdi_source import NxDINotFound, find_nxdi

if "nxdi_deepseek.backend" in sys.modules:
    raise pytest.UsageError("run `pytest test/unit` and `pytest test/integration` in two processes")


def pytest_sessionfinish(session, exitstatus):
    """Without NxDI every module is skipped, which pytest takes for a mistake."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        try:
            find_nxdi()
        except NxDINotFound:
            session.exitstatus = pytest.ExitCode.OK
