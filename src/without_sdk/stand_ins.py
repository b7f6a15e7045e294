"""Import-only stand-ins for the closed parts of the Neuron SDK.

NxD and NxDI import torch_xla, torch_neuronx, the Neuron compiler and the NKI kernels at module level, also in CPU mode,
which runs none of them. `install()` makes those imports succeed where the packages are absent.

A stand-in computes nothing. Its names can be imported, used as annotation, default value, base class or decorator;
calling one raises `NeuronSDKUnavailable`. The few names that NxD and NxDI need while they import or set up CPU mode are
listed in `_DEFINED`; `define` adds to them.
"""

import contextlib
import enum
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
import typing

PACKAGES = ("libneuronxla", "neuronxcc", "nki", "nkilib", "torch_neuronx", "torch_xla", "torchvision")


class NeuronSDKUnavailable(RuntimeError):
    """Something of the Neuron SDK was called, and only its stand-in is there."""


class _PlaceholderType(type):
    """Placeholders are classes, so that they serve as annotations and base classes too."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(f"{cls!r} has no attribute {name}")
        child = _placeholder(cls.__module__, f"{cls.__qualname__}.{name}")
        setattr(cls, name, child)
        return child

    def __getitem__(cls, key):
        # Generic[...] in annotations, and kernel[grid] ahead of the call that launches it.
        return cls

    def __call__(cls, *args, **kwargs):
        raise NeuronSDKUnavailable(
            f"{cls!r} was called, but the Neuron SDK is not installed: this is a stand-in that can only be imported"
        )

    def __repr__(cls):
        return f"{cls.__module__}.{cls.__qualname__}"


def _placeholder(module, qualname):
    return _PlaceholderType(qualname.rpartition(".")[2], (), {"__module__": module, "__qualname__": qualname})


def kernel_decorator(function=None, **options):
    """Stands for `nki.jit` and its kin, with and without arguments: the kernel can be defined, but not called."""
    if function is None:
        return kernel_decorator
    return _placeholder(function.__module__, function.__qualname__)


def _platform_target():
    return os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")


class _CollectivesConfig:
    """NxD looks up this rank's ring neighbours whenever it builds its process groups. Only ring attention uses them."""

    def __init__(self, replica_groups):
        self.rank_src_tgt_pairs = {rank: None for group in replica_groups for rank in group}


# Named in NxD's blockwise configuration, and saved with it, as a member of the class at this place.
_BlockShardStrategy = enum.Enum(
    "BlockShardStrategy", {"HI_LO": 0, "PING_PONG": 1}, module="nkilib.core.moe.moe_cte.moe_cte_utils"
)


class _SkipMode(typing.NamedTuple):
    """Built as a default value; NxD's own blockwise matmul in torch reads it too."""

    skip_token: bool
    skip_weight: bool


_DEFINED = {
    "neuronxcc.nki": {"jit": kernel_decorator},
    "neuronxcc.nki._pre_prod_kernels.collectives": {"CollectivesConfig": _CollectivesConfig},
    "nki": {"jit": kernel_decorator},
    "nkilib.core.moe.moe_cte.moe_cte_utils": {
        "BlockShardStrategy": _BlockShardStrategy,
        "SkipMode": _SkipMode,
    },
    # The version from which NxDI's accuracy checks call logit_validation with the arguments it takes here.
    "torch_neuronx": {"__version__": "0.0.0.2.11.14773"},
    "torch_neuronx.utils": {"get_platform_target": _platform_target},
    "torch_neuronx.xla_impl.base": {"xla_call": kernel_decorator, "xla_hlo_call": kernel_decorator},
    "torch_neuronx.xla_impl.ops": {"nki_jit": kernel_decorator, "xla_hlo_call": kernel_decorator},
}


class _StandInModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        value = _placeholder(self.__name__, name)
        setattr(self, name, value)
        return value


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last in sys.meta_path, so that a package that is installed is never replaced."""

    def find_spec(self, fullname, path=None, target=None):
        parent = fullname.rpartition(".")[0]
        if parent:
            # A real package may lack a submodule; only the children of stand-ins are ours.
            if not isinstance(sys.modules.get(parent), _StandInModule):
                return None
        elif fullname not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _StandInModule(spec.name)

    def exec_module(self, module):
        vars(module).update(_DEFINED.get(module.__name__, {}))


def define(module, **names):
    """Gives the stand-in of a module names that do something. Comes before `install`."""
    _DEFINED.setdefault(module, {}).update(names)


def is_stand_in(module):
    return isinstance(module, _StandInModule)


def install():
    """Make the absent packages importable. Returns the names of those that are stand-ins."""
    import torch
    import transformers.utils.import_utils  # noqa: F401  (looks for torch_xla and torchvision as it is imported)

    if not any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        # What is installed comes first: as it is imported it looks for the others, and must not find their stand-ins.
        for name in PACKAGES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        sys.meta_path.append(_StandInFinder())
    absent = [name for name in PACKAGES if is_stand_in(importlib.import_module(name))]
    if "torch_neuronx" in absent:
        # torch_neuronx registers the runtime's classes; NxD names them in annotations.
        torch.classes.neuron = _placeholder("torch.classes", "neuron")
    return absent
