"""Prepares a process for lowering the device's graphs: once, ahead of importing anything that imports NxD or NxDI."""

import importlib
import logging
import os
import sys
import warnings

from ..errors import DeviceGraphError
from ..without_sdk import cpu_mode, nxdi_source

_prepared: str | None = None


def prepare(form: str = "executed") -> None:
    """Imports torch_xla, NxD and NxDI with the Neuron kernels in one of their forms (kernel_table.Kernel).

    Raises DeviceGraphError where a package is missing, or the process has another backend already, and NxDINotFound.
    """
    global _prepared
    if _prepared == form:
        return
    backend = sys.modules.get(f"{__package__.rpartition('.')[0]}.backend")
    if _prepared or getattr(backend, "NAME", "nxdi") != "nxdi" or "neuronx_distributed" in sys.modules:
        raise DeviceGraphError("this process has another backend already; lower graphs in a process of their own")
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ["NXDI_DEEPSEEK_BACKEND"] = "nxdi"
    # As torch-neuronx has it by default. Tensor.split then gives wrong values but along the first axis, without a word
    # (pytorch/xla issue 8640).
    os.environ.setdefault("XLA_DISABLE_FUNCTIONALIZATION", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else importing it starts processes that idle
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    _import_or_explain("torch_xla")
    if form == "executed":
        _import_or_explain("jaxlib.xla_client")
    from . import kernel_table

    kernel_table.define(form)
    nxdi_source.make_importable()
    os.environ.pop(cpu_mode.VARIABLE, None)  # the graphs of the device are wanted
    kernel_table.replace_in_nxd(form)
    _prepared = form


def is_prepared() -> bool:
    """Whether models of this process are to run on device graphs."""
    return _prepared == "executed"


def _import_or_explain(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DeviceGraphError(f"lowering needs {package} ({error}); `make graph-env` installs it") from None
