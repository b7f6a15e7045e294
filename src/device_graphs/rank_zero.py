"""NxD's state of rank 0, and the lowering of a module under it, as NxD's ModelBuilder traces it."""

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..dtypes import BY_TORCH, dtype_name
from ..errors import DeviceGraphError
from ..graph_cost.hlo import Graph

_random_inputs: list[Tensor] = []


@contextmanager
def rank_zero(tp_degree: int, lnc_size: int) -> Iterator[None]:
    """torch.distributed and NxD's groups as rank 0 of `tp_degree` sees them, in no process group at all."""
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trace.mock_torchdist import mock_distributed

    with mock_distributed(tp_degree), torch.no_grad():
        torch.distributed.init_process_group(backend="xla", rank=0, world_size=tp_degree)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_degree, skip_collective_init=True, lnc_size=lnc_size
        )
        parallel_state.initialize_speculative_draft_group(tp_degree)  # a draft's, as NxDI sets it up for tracing
        parallel_state.set_aot_mode(True)
        try:
            yield
        finally:
            parallel_state.set_aot_mode(False)
            parallel_state._SPECULATIVE_DRAFT_GROUP = None  # NxD leaves it
            parallel_state.destroy_model_parallel()


@dataclass(frozen=True)
class HookedCall:
    """A call of a module with forward hooks. args and output as they were, each tensor replaced by the place of its
    value among the graph's outputs."""

    module: nn.Module
    hooks: tuple[Callable[..., Any], ...]
    args: Any
    output: Any


@dataclass(frozen=True)
class LoweredGraph:
    """The graph of one module, and what its parameters and outputs are.

    hlo: serialised HloModuleProto. inputs, tensors: parameter number of each input and of each named tensor that the
    graph uses. constants: values by parameter number. random: shape and dtype by parameter number, to be drawn anew.
    outputs: of the module; those that hooks see follow. kernels: the calls of each while tracing.
    """

    hlo: bytes
    graph: Graph
    inputs: dict[int, int]
    tensors: dict[str, int]
    constants: dict[int, Tensor]
    random: dict[int, Tensor]
    outputs: list[Tensor]
    hooked: list[HookedCall] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)


def placeholder(tensor: Tensor) -> Tensor:
    """On the XLA device, of the same shape and dtype, without a value: reading it ends the process."""
    import torch_xla

    # create_placeholder_tensor of torch_xla's xla_builder does this too, without FP8.
    shape = {"type": BY_TORCH[dtype_name(tensor.dtype)].hlo.lower(), "sizes": tuple(tensor.shape)}
    return torch_xla._XLAC._xla_create_placeholder_tensor(shape)


def random_input(like: Tensor) -> Tensor:
    """A further parameter of the graph being traced: uniform in [0, 1), drawn for each call."""
    drawn = placeholder(like)
    _random_inputs.append(drawn)
    return drawn


def lower(module: nn.Module, inputs: tuple[Tensor, ...]) -> LoweredGraph:
    """Traces `module`, which returns a list of tensors. Comes within `rank_zero`.

    Raises DeviceGraphError where a kernel is left that does not run here, or a hook changes what its module returns.
    """
    import torch_xla

    from . import kernel_table

    torch_xla._XLAC._set_all_reduce_token("xla:0", None)  # it would chain the collectives to those of the last graph
    _random_inputs.clear()
    kernel_table.calls.clear()
    tensors = {name: placeholder(tensor) for name, tensor in named_tensors(module).items()}
    traced = [placeholder(tensor) for tensor in inputs]
    with _hooks_recorded(module) as calls, torch.device("xla"):
        outputs = list(torch.func.functional_call(module, tensors, tuple(traced)))
    shown, hooked = _hooked_outputs(calls, len(outputs))
    context = torch_xla._XLAC.lowering.LoweringContext("rank0")
    context.build([*outputs, *shown])
    graph = Graph.from_json(json.loads(context.hlo_json()))
    _check_executable(graph)
    given = _numbers(context, dict(enumerate(traced)))
    used = _numbers(context, tensors)
    drawn = _numbers(context, dict(enumerate(_random_inputs)))
    known = {*given.values(), *used.values(), *drawn.values()}
    rest = {n: tensor for n, tensor in context.device_parameter_id_tensor_mapping().items() if n not in known}
    return LoweredGraph(
        context.hlo(),
        graph,
        given,
        used,
        {number: tensor.cpu() for number, tensor in rest.items()},
        {number: _like(_random_inputs[place], "cpu") for place, number in drawn.items()},
        [_like(tensor, "meta") for tensor in outputs],
        hooked,
        kernel_table.calls.copy(),
    )


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, under all their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(module.named_buffers(remove_duplicate=False))


def _numbers(context: Any, tensors: dict[Any, Tensor]) -> dict[Any, int]:
    """Parameter numbers of those tensors that the graph uses."""
    numbers = {key: context.tensor_parameter_id(tensor) for key, tensor in tensors.items()}
    return {key: number for key, number in numbers.items() if number >= 0}


def _like(tensor: Tensor, device: str) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def hooks_of(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Tells one set of forward hooks from another."""
    return tuple((id(child), *child._forward_hooks) for child in module.modules() if child._forward_hooks)


@contextmanager
def _hooks_recorded(module: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Leaves forward hooks, which want values, for later; yields the calls that they are to see."""
    calls: list[tuple[Any, ...]] = []
    kept = {child: child._forward_hooks for child in module.modules() if child._forward_hooks}

    def record(hooks: tuple[Callable[..., Any], ...]) -> Callable[..., None]:
        return lambda child, args, output: calls.append((child, hooks, args, output))

    for child, hooks in kept.items():
        child._forward_hooks = OrderedDict({0: record(tuple(hooks.values()))})
    try:
        yield calls
    finally:
        for child, hooks in kept.items():
            child._forward_hooks = hooks


def _hooked_outputs(calls: list[tuple[Any, ...]], first: int) -> tuple[list[Tensor], list[HookedCall]]:
    """The tensors of all calls, and the calls with the tensors' places behind the first `first` outputs."""
    shown: list[Tensor] = []

    def place(tensor: Tensor) -> int:
        shown.append(tensor)
        return first + len(shown) - 1

    hooked = [
        HookedCall(child, hooks, *(pytree.tree_map_only(Tensor, place, value) for value in (args, output)))
        for child, hooks, args, output in calls
    ]
    return shown, hooked


def _check_executable(graph: Graph) -> None:
    for instruction in graph.instructions:
        if instruction.opcode == "custom-call":
            name = instruction.fields["customCallTarget"]
            raise DeviceGraphError(f"the graph calls {name}, which does not run here; add it to kernel_table.py")
