"""The tensor-parallel group: one process, or all processes of torch.distributed."""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError


def initialize_model_parallel(tp_degree: int, device: torch.device) -> None:
    """Joins the processes that torchrun started. Raises ConfigError unless there are `tp_degree` of them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        processes = dist.get_world_size()
    if processes != tp_degree:
        raise ConfigError(
            f"tp_degree {tp_degree} needs {tp_degree} processes, but there is {processes}: "
            f"start with torchrun --nproc-per-node {tp_degree}"
        )
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def tensor_parallel_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def tensor_parallel_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in place."""
    if tensor_parallel_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_last_dim(tensor: Tensor) -> Tensor:
    """The ranks' tensors side by side along the last axis."""
    if tensor_parallel_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(tensor_parallel_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=-1)
