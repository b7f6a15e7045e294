"""Custom calls of a graph: what each stands for, and the FLOPs that the graph does not show."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import GraphCostError
from ..expert_kernel import ExpertKernelCost, ExpertKernelSizes, cost_of_sizes
from .hlo import Graph, Instruction

BLOCKWISE_MATMUL = "BlockwiseMatmul"
BLOCKWISE_FORMULA = "blocks * block_size * 3 * 2 * hidden * intermediate"
RMS_NORM = "AwsNeuronRmsNorm"


def target(call: Instruction) -> str:
    return call.fields["customCallTarget"]


def kernel_flops(call: Instruction) -> int:
    """Matrix FLOPs inside a custom call. Raises GraphCostError for one that has no formula."""
    if target(call) == BLOCKWISE_MATMUL:
        sizes = _sizes(call)
        # Gate, up and down, a multiplication and an addition each, for every row of every block, padding included.
        return sizes["blocks"] * sizes["block_size"] * 3 * 2 * sizes["hidden"] * sizes["intermediate"]
    if target(call) == RMS_NORM:
        return 0
    raise GraphCostError(f"custom call {target(call)} has no formula; add one to graph_cost/kernels.py")


def expert_kernels(graph: Graph, top_k: int) -> tuple[ExpertKernelCost | None, int]:
    """The cost of all calls of the expert kernel, None without one, and the bytes of the weights that they are given.

    top_k: experts per token, which the kernel is not told.
    """
    calls = [call for call in graph.instructions if call.opcode == "custom-call" and target(call) == BLOCKWISE_MATMUL]
    weights = sum(operand.bytes for call in calls for operand in _weights(call))
    return _total([_expert_kernel(call, top_k) for call in calls]) if calls else None, weights


def _expert_kernel(call: Instruction, top_k: int) -> ExpertKernelCost:
    """Of a kernel that is not the one sharded over blocks too: its blocks move and multiply the same. Its instructions
    are not known."""
    sizes, gate_up = _sizes(call), _weights(call)[0].shapes[0]
    cost = cost_of_sizes(
        ExpertKernelSizes(
            tokens=sizes["tokens"],
            experts=gate_up.dims[0],
            top_k=top_k,
            hidden=sizes["hidden"],
            width=sizes["intermediate"],
            blocks=sizes["blocks"],
            block_size=sizes["block_size"],
            weight_bytes=gate_up.item_bytes,
            skip_token=sizes["skip_token"],
            skip_weight=sizes["skip_weight"],
        )
    )
    return cost if sizes["sharded_by"] == "block" else replace(cost, instructions=None)


def _total(costs: Sequence[ExpertKernelCost]) -> ExpertKernelCost:
    columns = {name: [getattr(cost, name) for cost in costs] for name in vars(costs[0])}
    return ExpertKernelCost(**{name: None if None in column else sum(column) for name, column in columns.items()})


def _sizes(call: Instruction) -> dict[str, Any]:
    """What neuron_ops.blockwise_matmul noted of a call."""
    return json.loads(base64.b64decode(call.fields["backendConfig"]))


def _weights(call: Instruction) -> list[Instruction]:
    """Gate and up [E, H, 2, I], down [E, I, H]."""
    return call.operands[2:4]
