"""What stands in the place of NxD's NxDModel: graphs by the shapes of their inputs, weights and caches of all ranks."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DeviceGraphError
from ..graph_cost.count import GraphCost, count
from . import rank_zero
from .rank_zero import LoweredGraph
from .replicas import Buffer, Replicas, to_numpy, to_torch

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Lowering:
    """A graph, and its state by name: the output that is its next value."""

    lowered: LoweredGraph
    aliases: dict[str, int]
    seconds: float


class BucketGraph:
    """One bucket of one of NxDI's models: lowered at once, compiled when it is called first.

    `lower` lowers it, again where forward hooks of `module` came or went.
    """

    def __init__(self, name: str, inputs: tuple[Tensor, ...], module: nn.Module, lower: Callable[[], Lowering]):
        self.name, self.module = name, module
        self.shapes: Shapes = shapes_of(inputs)
        self._lower = lower
        self.calls, self.compile_seconds = 0, 0.0
        self._lower_again()

    def _lower_again(self) -> None:
        self._hooks = rank_zero.hooks_of(self.module)
        self.lowering, self._executable = self._lower(), None
        self._constants: dict[int, list[Buffer]] = {}

    def cost(self) -> GraphCost:
        return count(self.lowering.lowered.graph)

    def executable(self, replicas: Replicas) -> Any:
        if self._hooks != rank_zero.hooks_of(self.module):
            self._lower_again()
        if self._executable is None:
            start = time.monotonic()
            lowered = self.lowering.lowered
            self._executable = replicas.compile(lowered.hlo)
            self._constants = {number: replicas.replicate(value) for number, value in lowered.constants.items()}
            self.compile_seconds = time.monotonic() - start
        return self._executable

    def arguments(
        self, inputs: tuple[Tensor, ...], tensors: Mapping[str, list[Buffer]], replicas: Replicas
    ) -> list[list[Buffer]]:
        """Buffers by parameter number and rank."""
        lowered = self.lowering.lowered
        by_number = dict(self._constants)
        by_number |= {number: tensors[name] for name, number in lowered.tensors.items()}
        by_number |= {number: replicas.replicate(inputs[place].clone()) for place, number in lowered.inputs.items()}
        by_number |= {number: replicas.replicate(torch.rand_like(like)) for number, like in lowered.random.items()}
        return [by_number[number] for number in range(len(by_number))]


class DeviceModel:
    """All graphs of a model over weights and caches, by name and rank.

    Called with the inputs of a graph it returns its first output that is no cache, or the list of them, as NxDModel
    does. Outputs must be the same on all ranks; so must caches, which `kv_seq_shards` adjacent ranks share: on those
    that hold the same part. Raises DeviceGraphError, and ValueError for inputs of other shapes.
    """

    def __init__(
        self,
        replicas: Replicas,
        graphs: Iterable[BucketGraph],
        tensors: dict[str, list[Buffer]],
        kv_seq_shards: int = 1,
    ):
        self.replicas, self.graphs, self.tensors = replicas, list(graphs), tensors
        self.kv_seq_shards = kv_seq_shards
        self._by_shapes = {graph.shapes: graph for graph in self.graphs}
        for graph in self.graphs:
            self._check_shapes(graph)

    def __call__(self, *inputs: Tensor) -> Any:
        graph = self._route(inputs)
        executable = graph.executable(self.replicas)
        outputs = self.replicas.execute(executable, graph.arguments(inputs, self.tensors, self.replicas))
        return self._take(graph, outputs)

    def _route(self, inputs: tuple[Tensor, ...]) -> BucketGraph:
        shapes = shapes_of(inputs)
        if shapes not in self._by_shapes:
            known = "; ".join(f"{graph.name} {list(graph.shapes)}" for graph in self.graphs)
            raise ValueError(f"Input shape {list(shapes)} not found in the graphs: {known}")
        return self._by_shapes[shapes]

    def _take(self, graph: BucketGraph, outputs: list[list[Buffer]]) -> Any:
        graph.calls += 1
        lowering = graph.lowering
        for name, place in lowering.aliases.items():
            _check_same(f"{name} after {graph.name}", outputs[place], self.kv_seq_shards)
            self.tensors[name] = outputs[place]
        for call in lowering.lowered.hooked:
            self._run_hooks(call, outputs)
        aliased = set(lowering.aliases.values())
        results = []
        for place in range(len(lowering.lowered.outputs)):
            if place not in aliased:
                _check_same(f"output {place} of {graph.name}", outputs[place])
                results.append(to_torch(outputs[place][0]))
        return results[0] if len(results) == 1 else results

    @staticmethod
    def _run_hooks(call: rank_zero.HookedCall, outputs: list[list[Buffer]]) -> None:
        """With the values of rank 0."""
        args, output = (
            pytree.tree_map_only(int, lambda place: to_torch(outputs[place][0]), value)
            for value in (call.args, call.output)
        )
        for hook in call.hooks:
            if hook(call.module, args, output) is not None:
                raise DeviceGraphError("a forward hook changes what its module returns, which a graph cannot take")

    def _check_shapes(self, graph: BucketGraph) -> None:
        """A buffer of another size would be read past its end."""
        lowered = graph.lowering.lowered
        for name, number in lowered.tensors.items():
            wanted = lowered.graph.parameters[number].shapes[0].dims
            for rank, buffer in enumerate(self.tensors[name]):
                if tuple(to_numpy(buffer).shape) != wanted:
                    raise DeviceGraphError(
                        f"{graph.name}: {name} is {list(wanted)} in the graph and {list(to_numpy(buffer).shape)} on "
                        f"rank {rank}"
                    )

    @property
    def kernels(self) -> Counter[str]:
        """Calls of each Neuron kernel in the graphs, by its name."""
        return sum((graph.lowering.lowered.kernels for graph in self.graphs), Counter())


class TracedModule:
    """What a ModelWrapper of NxDI calls its model: runs the graphs, and has the attributes of the traced module."""

    def __init__(self, device_model: DeviceModel, module: nn.Module):
        self.nxd_model, self._module = device_model, module

    def __call__(self, *inputs: Tensor) -> Any:
        return self.nxd_model(*inputs)

    def state_dict(self) -> dict[str, Tensor]:
        """NxD's expert layers ask for its state as they are saved."""
        neuron_config = self._module.neuron_config
        with rank_zero.rank_zero(neuron_config.tp_degree, neuron_config.logical_nc_config):
            return self._module.state_dict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def shapes_of(inputs: Iterable[Tensor]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in inputs)


def _check_same(what: str, buffers: list[Buffer], shards: int = 1) -> None:
    """On ranks whose numbers are the same modulo `shards`."""
    first = [to_numpy(buffer).tobytes() for buffer in buffers[:shards]]
    for rank, buffer in enumerate(buffers[shards:], shards):
        if to_numpy(buffer).tobytes() != first[rank % shards]:
            raise DeviceGraphError(f"{what} differs between rank {rank % shards} and rank {rank}")
