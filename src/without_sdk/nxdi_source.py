"""Finds NxD and NxDI, installed or as the source of their public repositories, and makes them importable."""

import importlib.util
import os
import sys
from pathlib import Path

from ..errors import DeepseekError
from . import stand_ins

DEFAULT_SOURCE = "~/.cache/nxdi-source"

# Package name -> the folder of its repository below NXDI_SOURCE.
_PACKAGES = {
    "neuronx_distributed": "neuronx-distributed",
    "neuronx_distributed_inference": "neuronx-distributed-inference",
}


class NxDINotFound(DeepseekError, ImportError):
    """NxD and NxDI are neither installed nor where their source is looked for."""


def make_importable() -> None:
    """Lets this process import NxD and NxDI: stand-ins for what is absent, their source on sys.path.

    Raises NxDINotFound. What `stand_ins.define` adds has to be added before.
    """
    folders = find_nxdi()
    stand_ins.install()
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def find_nxdi() -> list[str]:
    """The folders that sys.path lacks for importing both: none where they are installed. Raises NxDINotFound."""
    if all(importlib.util.find_spec(package) for package in _PACKAGES):
        return []
    return find_nxdi_source()


def find_nxdi_source() -> list[str]:
    """The source folders of both. Raises NxDINotFound."""
    root = Path(os.environ.get("NXDI_SOURCE") or DEFAULT_SOURCE).expanduser()
    folders = [root / repository / "src" for repository in _PACKAGES.values()]
    for folder, package in zip(folders, _PACKAGES, strict=True):
        if not (folder / package / "__init__.py").is_file():
            raise NxDINotFound(
                f"no NxDI: {package} is neither installed nor in {folder};"
                " git clone https://github.com/aws-neuron/neuronx-distributed and"
                " https://github.com/aws-neuron/neuronx-distributed-inference"
                f" into {DEFAULT_SOURCE}, or set NXDI_SOURCE to the folder that holds both"
            )
    return [str(folder) for folder in folders]
