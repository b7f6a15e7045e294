"""Runs functions whenever some module has been imported, without importing that module."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Calls callback(module) now if the module is imported, and after each time that it is executed from now on.

    The same callback again changes nothing but that it is called now.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    callbacks = _finder.callbacks.setdefault(name, [])
    if callback not in callbacks:
        callbacks.append(callback)
    if name in sys.modules:
        callback(sys.modules[name])


class _CallingFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module, and adds its callbacks to the loading."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callback]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        spec = self._spec_of_the_others(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _CallingLoader(spec.loader, self.callbacks[fullname])
        return spec

    def _spec_of_the_others(self, *module: Any) -> importlib.machinery.ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(*module)
                if spec is not None:
                    return spec
        return None


class _CallingLoader:
    """Stands before a module's loader until the module is executed: then the module has its own loader again.

    Who looks at the spec alone (importlib.util.find_spec, runpy) finds all attributes of that loader here.
    """

    def __init__(self, loader: Any, callbacks: list[Callback]):
        self._loader, self._callbacks = loader, callbacks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for while this is copied, when there is no _loader yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        for callback in self._callbacks:
            callback(module)


_finder = _CallingFinder()
