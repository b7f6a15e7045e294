"""Counts turned into a bound on time: what one logical NeuronCore of trn2 needs at the least, were it always busy.

bound = max(matrix FLOPs / peak, bytes / memory bandwidth) + collectives, each of them its latency and its transfer.
bytes: the min bytes, with what the expert kernel moves in the place of its weights read once.
Nothing here was measured by us. It is for choosing between graphs, and no prediction.
"""

from dataclasses import dataclass

from ..dtypes import BY_HLO
from .count import Collective, GraphCost

_CORES_PER_CHIP = 4  # logical cores at LNC 2; a chip has eight NeuronCores-v3


@dataclass(frozen=True)
class Machine:
    """One rank of a trn2.48xlarge at LNC 2. Figures of a chip (Neuron documentation, Trainium2 architecture: 667 BF16
    and 181 FP32 TFLOPS, 2.9 TB/s HBM; Trn2 architecture: 1,024 GB/s NeuronLink-v3) divided by its four logical cores.

    collective_seconds is the upper end of the "10^0 to 10^1 us" that the documentation gives for the latency of a
    collective within an instance (Neuron runtime, intra-node collective communications).
    """

    bf16_flops: float = 667e12 / _CORES_PER_CHIP
    f32_flops: float = 181e12 / _CORES_PER_CHIP
    hbm_bytes: float = 2.9e12 / _CORES_PER_CHIP
    link_bytes: float = 1.024e12 / _CORES_PER_CHIP
    collective_seconds: float = 10e-6


@dataclass(frozen=True)
class Bound:
    """Seconds per call of a graph: per token of every sequence for decoding, per batch of prompts for prefill."""

    compute: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.collectives


def bound(cost: GraphCost, machine: Machine) -> Bound:
    """The bound of one graph."""
    compute = sum(flops / _peak(dtype, machine) for dtype, flops in cost.dot_flops.items())
    compute += sum(cost.kernel_flops.values()) / machine.bf16_flops
    collectives = sum(item.count * _collective_seconds(item, machine) for item in cost.collectives)
    return Bound(compute, cost.memory_bytes / machine.hbm_bytes, collectives)


def _peak(dtype: str, machine: Machine) -> float:
    return machine.bf16_flops if BY_HLO[dtype].item_bytes <= 2 else machine.f32_flops


def _collective_seconds(collective: Collective, machine: Machine) -> float:
    # An all-reduce is a reduce-scatter and an all-gather, and moves its payload twice.
    passes = 2 if collective.kind == "all-reduce" else 1
    return machine.collective_seconds + passes * collective.payload_bytes / machine.link_bytes
