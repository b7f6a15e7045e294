"""One rank's part of an unsharded tensor, as NxD cuts it."""

import torch
from torch import Tensor

from ..checkpoint.layout import TensorSpec


def shard(tensor: Tensor, spec: TensorSpec, rank: int, tp_degree: int) -> Tensor:
    """The slice of `tensor` that `rank` holds; a copy where it is one, so that the whole can be freed."""
    if spec.partition_dim is None or tp_degree == 1:
        return tensor
    pieces = tensor.chunk(tp_degree * spec.stride, dim=spec.partition_dim)
    return torch.cat(pieces[rank::tp_degree], dim=spec.partition_dim)
