"""`nxdi-deepseek without-sdk`: a command with NxDI in CPU mode, on a machine without the Neuron SDK."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from ..errors import ConfigError
from ..without_sdk.environment import cpu_environment
from ..without_sdk.nxdi_source import find_nxdi


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("program", metavar="COMMAND", help="such as nxdi-deepseek, vllm, torchrun, pytest or python")
    rest = parser.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER, help="the command's own")
    rest.required = False


def run(args: argparse.Namespace) -> int:
    """Becomes the command."""
    find_nxdi()  # what is missing is told here, not by one of the command's processes
    program = _find_program(args.program)
    sys.stdout.flush()
    try:
        # By its full path: a Python finds its environment from the name it is called by.
        os.execve(program, [program, *args.arguments], cpu_environment())
    except OSError as error:
        raise ConfigError(f"{program}: cannot be run ({error.strerror})") from None


def _find_program(name: str) -> str:
    """In the environment of this Python first, which need not be active."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(name, path=folders)
    if program is None:
        raise ConfigError(f"{name}: no such command; install it beside {sys.executable}, or give its path")
    return program
