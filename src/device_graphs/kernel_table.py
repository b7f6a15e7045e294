"""The Neuron kernels that NxD and NxDI call in the graphs of this package, each with its two forms. The one table."""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..graph_cost import neuron_ops
from ..graph_cost.kernels import BLOCKWISE_MATMUL, RMS_NORM
from ..without_sdk import stand_ins
from . import executable_kernels as executable

_HLO_FUNCTION = "xla_hlo_call"
_OPS, _BLOCKWISE = "torch_neuronx.xla_impl.ops", "neuronx_distributed.modules.moe.blockwise"


@dataclass(frozen=True)
class Kernel:
    """name: on Neuron. places: where it is called from, as MODULE:NAME; for functions that build HLO by hand,
    xla_hlo_call:QUALNAME. executed: what it computes, in torch. counted: what graph-cost counts, None where that is the
    executed form, one operation of XLA or a few.
    """

    name: str
    places: tuple[str, ...]
    executed: Callable[..., Any]
    counted: Callable[..., Any] | None = None


KERNELS = (
    Kernel(RMS_NORM, (f"{_OPS}:RmsNorm",), executable.rms_norm, neuron_ops.rms_norm),
    Kernel(
        BLOCKWISE_MATMUL,
        (f"{_BLOCKWISE}:_call_bwmm_shard_on_block_kernel",),
        executable.blockwise_matmul,
        neuron_ops.blockwise_matmul,
    ),
    Kernel(
        BLOCKWISE_MATMUL,
        (f"{_BLOCKWISE}:_call_shard_on_intermediate_kernel",),
        executable.blockwise_matmul,
        lambda args: neuron_ops.blockwise_matmul(args, "intermediate"),
    ),
    # Not in NxD's release, but other packages were written for one that has it.
    Kernel(
        f"{BLOCKWISE_MATMUL}, sharded by hidden",
        (f"{_BLOCKWISE}:_call_shard_hidden_kernel",),
        lambda args: (executable.blockwise_matmul(args), None, None),
        lambda args: (neuron_ops.blockwise_matmul(args, "hidden"), None, None),
    ),
    Kernel("DynamicUpdateSlice", (f"{_HLO_FUNCTION}:fill_prefix.<locals>.xla_fill_prefix",), executable.fill_prefix),
    Kernel("Rng", (f"{_HLO_FUNCTION}:rand_like",), executable.rand_like),
    Kernel("AwsNeuronArgMax", (f"{_OPS}:Argmax",), executable.argmax),
    Kernel("AwsNeuronTopK", (f"{_OPS}:TopK",), executable.top_k),
    Kernel("nkilib topk", ("nkilib.core.topk:topk",), executable.top_k),
    Kernel("nkilib cascaded_max", ("nkilib.core.max.cascaded_max:cascaded_max",), executable.cascaded_max),
    Kernel("nkilib cumsum", ("nkilib.core.cumsum.cumsum:cumsum",), executable.cumsum),
    Kernel(
        "layer boundary",
        (f"{_HLO_FUNCTION}:ModuleMarkerStart.forward_impl", f"{_HLO_FUNCTION}:ModuleMarkerEnd.forward_impl"),
        executable.identity,
    ),
)

# How often each kernel was called while graphs were traced, by name.
calls: Counter[str] = Counter()


class _Launcher:
    """A form under all the ways in which kernels are called: f(...), f[grid](...) and f.apply(...)."""

    def __init__(self, name: str, form: Callable[..., Any]):
        self.name, self.form = name, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls[self.name] += 1
        return self.form(*args, **kwargs)

    apply = __call__

    def __getitem__(self, grid: Any) -> "_Launcher":
        return self


def define(form: str) -> None:
    """Gives the stand-ins of the closed packages the kernels, "executed" or "counted". Comes ahead of importing NxD."""
    launchers = _launchers(form)
    built_by_hand = {
        place.partition(":")[2]: launcher for place, launcher in launchers.items() if place.startswith(_HLO_FUNCTION)
    }

    def xla_hlo_call(function: Callable[..., Any]) -> Callable[..., Any]:
        return built_by_hand.get(function.__qualname__, stand_ins.kernel_decorator(function))

    for module in ("torch_neuronx.xla_impl.base", _OPS):
        stand_ins.define(module, xla_hlo_call=xla_hlo_call)
    for place, launcher in launchers.items():
        module, _, name = place.partition(":")
        if module not in (_HLO_FUNCTION, _BLOCKWISE):
            stand_ins.define(module, **{name: launcher})


def replace_in_nxd(form: str) -> None:
    """Puts the expert kernels in the place of NxD's functions that launch them. Comes after `define`."""
    blockwise = importlib.import_module(_BLOCKWISE)
    blockwise.torch_to_nki_dtype = str
    blockwise.ActivationFunction = int
    for place, launcher in _launchers(form).items():
        module, _, name = place.partition(":")
        if module == _BLOCKWISE:
            setattr(blockwise, name, launcher)


def _launchers(form: str) -> dict[str, _Launcher]:
    """By place."""
    found = {}
    for kernel in KERNELS:
        function = (kernel.counted if form == "counted" else None) or kernel.executed
        found |= dict.fromkeys(kernel.places, _Launcher(kernel.name, function))
    return found
