"""Python runs this at its start when this folder is on PYTHONPATH (see without_sdk.py).

It costs nothing until the process asks for NxD or NxDI; then it makes them importable.
"""

import importlib.abc
import sys


class _OnFirstUse(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname in ("neuronx_distributed", "neuronx_distributed_inference"):
            sys.meta_path.remove(self)
            from support import nxdi

            nxdi.make_importable()
        return None  # the next finder looks, on the sys.path as it is now


sys.meta_path.insert(0, _OnFirstUse())
