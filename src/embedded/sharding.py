"""One rank's part of an unsharded tensor, as NxD cuts it."""

import torch
from torch import Tensor

from ..checkpoint.layout import TensorSpec


def shard(tensor: Tensor, spec: TensorSpec, rank: int, tp_degree: int) -> Tensor:
    """The slice of `tensor` that `rank` holds; a copy where it is one, so that the whole can be freed."""
    if spec.partition_dim is None or tp_degree == 1:
        return tensor
    ranges = spec.grid.rank_ranges(rank, tp_degree)
    parts = [tensor.narrow(spec.partition_dim, start, stop - start) for start, stop in ranges]
    return torch.cat(parts, dim=spec.partition_dim)
