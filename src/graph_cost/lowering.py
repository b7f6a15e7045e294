"""Lowers one graph of rank 0 with torch_xla, without weights and without a device, and counts it.

`python -m nxdi_deepseek.graph_cost.lowering` reads requests from its input, one line of JSON each, and answers each
with one. A process lowers one graph, since torch_xla chains the collectives of a process and a second graph would hold
those of the first: every request gets a fork, ahead of which the slow imports are done once.
"""

import contextlib
import importlib
import json
import multiprocessing
import sys
import traceback
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..device_graphs import process
from ..errors import DeepseekError, GraphCostError
from . import neuron_ops
from .count import GraphCost, bytes_read, count
from .hlo import Graph
from .kernels import expert_kernels
from .request import Request


def lower(request: Request) -> GraphCost:
    """Builds, traces and counts the graph of a request."""
    from neuronx_distributed.trace.mock_torchdist import mock_distributed

    from ..device_graphs import kernel_table
    from .rank_model import Part

    with mock_distributed(request.tp_degree), torch.no_grad():
        part = Part(request)
        flop_counter = _flops_on_meta(part)
        weights = _to_placeholders(part)
        kernel_table.calls.clear()
        hlo, numbers = _trace(part, weights)
        calls = dict(kernel_table.calls)
    graph = Graph.from_json(hlo)
    expert_kernel, expert_weight_bytes = expert_kernels(graph, request.model.num_experts_per_tok)
    read = {name: bytes_read(graph.parameters[number]) for name, number in numbers.items()}
    return replace(
        count(graph),
        parameter_bytes=sum(weight.nbytes for weight in weights.values()),
        parameter_bytes_read=sum(read.values()),
        parameters_unread={name: weight.nbytes for name, weight in weights.items() if name not in read},
        kv_bytes_per_token=part.kv_bytes_per_token,
        flop_counter=flop_counter,
        expert_kernel=expert_kernel,
        expert_kernel_weight_bytes=expert_weight_bytes,
        kernel_calls=calls,
    )


def _prepare_process() -> None:
    process.prepare("counted")
    neuron_ops.replace_collectives()
    importlib.import_module(f"{__package__}.rank_model")


def _flops_on_meta(part: nn.Module) -> int:
    """Matrix FLOPs by torch's own count. A read of a value, which a traced graph cannot do, fails on this device."""
    counter = FlopCounterMode(display=False)
    try:
        with torch.device("meta"), counter:
            _run(part, lambda tensor: tensor.to("meta"))
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0]
        raise GraphCostError(f"the model reads a tensor's value, which a static graph cannot: {reason}") from error
    return counter.get_total_flops()


def _run(part: nn.Module, move: Any) -> list[Tensor]:
    inputs = pytree.tree_map_only(Tensor, move, part.inputs)
    return part(**inputs) if isinstance(inputs, dict) else part(*inputs)


def _to_placeholders(part: nn.Module) -> dict[str, Tensor]:
    """Puts placeholders on the XLA device in the place of parameters and buffers. Returns the weights by name."""
    weights = {}
    for prefix, module in part.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = placeholder = _placeholder(tensor)
                    weights[f"{prefix}.{name}"] = placeholder
    return {name: weight for name, weight in weights.items() if "kv_mgr" not in name}


def _placeholder(tensor: Tensor) -> Tensor:
    from torch_xla.core import xla_builder

    placeholder = xla_builder.create_placeholder_tensor(tuple(tensor.shape), tensor.dtype)
    return nn.Parameter(placeholder, requires_grad=False) if isinstance(tensor, nn.Parameter) else placeholder


def _trace(part: nn.Module, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, int]]:
    """The HLO module, and the parameter number of each weight that the graph uses."""
    import torch_xla

    outputs = _run(part, _placeholder)
    context = torch_xla._XLAC.lowering.LoweringContext("rank0")
    context.build(outputs)
    numbers = {name: context.tensor_parameter_id(weight) for name, weight in weights.items()}
    return json.loads(context.hlo_json()), {name: number for name, number in numbers.items() if number >= 0}


def main() -> int:
    answers, failure = sys.stdout, None
    with contextlib.redirect_stdout(sys.stderr):  # NxD logs to stdout
        try:
            _prepare_process()
        except DeepseekError as error:
            failure = json.dumps({"error": str(error)})
        for line in sys.stdin:
            print(failure or _in_fork(Request.from_json(line)), file=answers, flush=True)
    return 0


def _in_fork(request: Request) -> str:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(request, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        # torch_xla ends the process when the value of a placeholder is read.
        return json.dumps({"error": "the process that lowered the graph died; does the model read a tensor's value?"})
    finally:
        process.join()


def _answer(request: Request, sender: Any) -> None:
    try:
        result = lower(request).to_dict()
    except DeepseekError as error:
        result = {"error": str(error)}
    except Exception as error:  # of the package that is lowered, or of NxD with what it was given
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        result = {"error": f"{reason} ({place.filename}, line {place.lineno})"}
    sender.send(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
