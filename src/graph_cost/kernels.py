"""Custom calls of a graph: what each stands for, and the FLOPs that the graph does not show."""

import base64
import json

from ..errors import GraphCostError
from .hlo import Instruction

BLOCKWISE_MATMUL = "BlockwiseMatmul"
BLOCKWISE_FORMULA = "blocks * block_size * 3 * 2 * hidden * intermediate"
RMS_NORM = "AwsNeuronRmsNorm"


def target(call: Instruction) -> str:
    return call.fields["customCallTarget"]


def kernel_flops(call: Instruction) -> int:
    """Matrix FLOPs inside a custom call. Raises GraphCostError for one that has no formula."""
    if target(call) == BLOCKWISE_MATMUL:
        sizes = json.loads(base64.b64decode(call.fields["backendConfig"]))
        # Gate, up and down, a multiplication and an addition each, for every row of every block, padding included.
        return sizes["blocks"] * sizes["block_size"] * 3 * 2 * sizes["hidden"] * sizes["intermediate"]
    if target(call) == RMS_NORM:
        return 0
    raise GraphCostError(f"custom call {target(call)} has no formula; add one to graph_cost/kernels.py")
