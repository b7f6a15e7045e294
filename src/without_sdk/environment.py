"""The environment of a command that uses NxDI's CPU mode, in all of its processes."""

import os
from pathlib import Path

from ..integrations.vllm import CPU_VARIABLE
from . import cpu_mode

_SITE = Path(__file__).parent / "site"


def cpu_environment() -> dict[str, str]:
    """This process's variables and those that let every Python below it import NxD and NxDI, for the CPU.

    A Python that takes part has this package installed.
    """
    paths = [str(_SITE), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), cpu_mode.VARIABLE: "1", CPU_VARIABLE: "1"}
