"""Python runs this at its start when this folder is on PYTHONPATH (see environment.py).

It costs nothing until the process asks for NxD or NxDI; then it makes them importable.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


class _OnFirstUse(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname in ("neuronx_distributed", "neuronx_distributed_inference"):
            sys.meta_path.remove(self)  # what follows looks for them too
            try:
                from nxdi_deepseek.without_sdk import cpu_mode

                cpu_mode.set_up()
            except BaseException:
                sys.meta_path.insert(0, self)  # the next one to ask is told the same
                raise
        return None  # the next finder looks, on the sys.path as it is now


def _run_hidden():
    """Runs the sitecustomize that this one stands before, as Python would have."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _OnFirstUse())
_run_hidden()
