"""The integration tests run on NxDI; a process has one backend, so they need one of their own."""

import sys

import pytest

if "nxdi_deepseek.backend" in sys.modules:
    raise pytest.UsageError("run `pytest test/unit` and `pytest test/integration` in two processes")
