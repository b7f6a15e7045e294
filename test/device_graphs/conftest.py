"""These tests run on the device's own graphs; a process has one backend, so they need one of their own."""

import pytest
from nxdi_deepseek.device_graphs import process
from nxdi_deepseek.errors import DeepseekError

try:
    process.prepare()
except DeepseekError as error:
    raise pytest.UsageError(str(error)) from error

from support import nxdi  # noqa: E402


@pytest.fixture(autouse=True)
def rank_zero_is_left():
    yield
    nxdi.leave_parallel()


def pytest_sessionfinish(session):
    """A test that skips was run on no graph."""
    if session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
