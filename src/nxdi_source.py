"""Finds NxD and NxDI: installed, or as the source of their public repositories."""

import importlib.util
import os
import pathlib

DEFAULT_SOURCE = "~/.cache/nxdi-source"

# Package name -> the folder of its repository below NXDI_SOURCE.
_PACKAGES = {
    "neuronx_distributed": "neuronx-distributed",
    "neuronx_distributed_inference": "neuronx-distributed-inference",
}


class NxDINotFound(ImportError):
    """NxD and NxDI are neither installed nor where their source is looked for."""


def find_nxdi() -> list[str]:
    """The folders that sys.path lacks for importing NxD and NxDI: none where they are installed."""
    if all(importlib.util.find_spec(package) for package in _PACKAGES):
        return []
    return find_nxdi_source()


def find_nxdi_source() -> list[str]:
    """The source folders of both. Raises NxDINotFound."""
    root = pathlib.Path(os.environ.get("NXDI_SOURCE") or DEFAULT_SOURCE).expanduser()
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
