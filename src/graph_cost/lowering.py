"""Lowers one graph of rank 0 with torch_xla, without weights and without a device, and counts it.

`python -m nxdi_deepseek.graph_cost.lowering` reads lines of JSON from its input, a task ("cost" or "patterns") and its
request, and answers each with one. A process lowers one graph, since torch_xla chains the collectives of a process and
a second graph would hold those of the first: every request gets a fork, ahead of which the slow imports are done once.
"""

import contextlib
import importlib
import json
import multiprocessing
import sys
import traceback
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..device_graphs import process
from ..device_graphs.rank_zero import placeholder
from ..errors import DeepseekError, GraphCostError
from . import neuron_ops
from .count import bytes_read, count
from .hlo import Graph
from .kernels import expert_kernels
from .patterns import find_patterns
from .request import Request


def lower(request: Request) -> dict[str, Any]:
    """Builds, traces and counts the graph of a request: GraphCost as a dictionary."""
    from neuronx_distributed.trace.mock_torchdist import mock_distributed

    from ..device_graphs import kernel_table
    from .rank_model import Part

    with mock_distributed(request.tp_degree), torch.no_grad():
        part = Part(request)
        flop_counter = _flops_on_meta(part)
        weights = _to_placeholders(part)
        kernel_table.calls.clear()
        hlo, numbers = _trace(part, part.inputs, weights)
        calls = dict(kernel_table.calls)
    graph = Graph.from_json(hlo)
    expert_kernel, expert_weight_bytes = expert_kernels(graph, request.model.num_experts_per_tok)
    parameters = graph.parameters
    read = {name: bytes_read(parameters[number]) for name, number in numbers.items()}
    dtypes: Counter[str] = Counter()
    for number in numbers.values():
        dtypes[parameters[number].shapes[0].dtype] += parameters[number].bytes
    cost = replace(
        count(graph),
        parameter_bytes=sum(weight.nbytes for weight in weights.values()),
        parameter_bytes_read=sum(read.values()),
        parameter_dtypes=dict(dtypes),
        parameters_unread={name: weight.nbytes for name, weight in weights.items() if name not in read},
        kv_bytes_per_token=part.kv_bytes_per_token,
        flop_counter=flop_counter,
        expert_kernel=expert_kernel,
        expert_kernel_weight_bytes=expert_weight_bytes,
        kernel_calls=calls,
    )
    return cost.to_dict()


def patterns(request: Request) -> list[dict[str, Any]]:
    """Builds and traces the graph of a request, and lists its kinds of instructions."""
    from neuronx_distributed.trace.mock_torchdist import mock_distributed

    from .rank_model import Part

    with mock_distributed(request.tp_degree), torch.no_grad():
        part = Part(request)
        hlo = trace(part, part.inputs)
    return [asdict(found) for found in find_patterns(hlo)]


def prepare_process() -> None:
    process.prepare("counted")
    neuron_ops.replace_collectives()
    importlib.import_module(f"{__package__}.rank_model")


def _flops_on_meta(part: nn.Module) -> int:
    """Matrix FLOPs by torch's own count. A read of a value, which a traced graph cannot do, fails on this device."""
    counter = FlopCounterMode(display=False)
    try:
        with torch.device("meta"), counter:
            _run(part, part.inputs, lambda tensor: tensor.to("meta"))
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0]
        raise GraphCostError(f"the model reads a tensor's value, which a static graph cannot: {reason}") from error
    return counter.get_total_flops()


def _run(module: nn.Module, inputs: Any, move: Any) -> list[Tensor]:
    moved = pytree.tree_map_only(Tensor, move, inputs)
    return module(**moved) if isinstance(moved, dict) else module(*moved)


def _to_placeholders(part: nn.Module) -> dict[str, Tensor]:
    """Puts placeholders on the XLA device in the place of parameters and buffers. Returns the weights by name."""
    weights = {}
    for prefix, module in part.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = weights[f"{prefix}.{name}"] = _placeholder(tensor)
    return {name: weight for name, weight in weights.items() if not _is_state(name)}


def _is_state(name: str) -> bool:
    return "kv_mgr" in name or "hidden_state_rolling_buffer" in name


def _placeholder(tensor: Tensor) -> Tensor:
    held = placeholder(tensor)
    return nn.Parameter(held, requires_grad=False) if isinstance(tensor, nn.Parameter) else held


def trace(module: nn.Module, inputs: Any) -> dict[str, Any]:
    """The HLO module of a module on the meta device, with the source line of each instruction."""
    import torch_xla

    torch_xla._XLAC._set_ir_debug(True)
    return _trace(module, inputs, _to_placeholders(module))[0]


def _trace(module: nn.Module, inputs: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, int]]:
    """The HLO module, and the parameter number of each weight that the graph uses."""
    import torch_xla

    outputs = _run(module, inputs, _placeholder)
    context = torch_xla._XLAC.lowering.LoweringContext("rank0")
    context.build(outputs)
    numbers = {name: context.tensor_parameter_id(weight) for name, weight in weights.items()}
    return json.loads(context.hlo_json()), {name: number for name, number in numbers.items() if number >= 0}


def main() -> int:
    answers, failure = sys.stdout, None
    with contextlib.redirect_stdout(sys.stderr):  # NxD logs to stdout
        try:
            prepare_process()
        except DeepseekError as error:
            failure = json.dumps({"error": str(error)})
        for line in sys.stdin:
            print(failure or _in_fork(*json.loads(line)), file=answers, flush=True)
    return 0


def _in_fork(task: str, request: str) -> str:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_answer, args=(task, Request.from_json(request), sender)
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        # torch_xla ends the process when the value of a placeholder is read.
        return json.dumps({"error": "the process that lowered the graph died; does the model read a tensor's value?"})
    finally:
        process.join()


def _answer(task: str, request: Request, sender: Any) -> None:
    try:
        result = {"cost": lower, "patterns": patterns}[task](request)
    except DeepseekError as error:
        result = {"error": str(error)}
    except Exception as error:  # of the package that is lowered, or of NxD with what it was given
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        result = {"error": f"{reason} ({place.filename}, line {place.lineno})"}
    sender.send(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
