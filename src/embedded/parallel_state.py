"""The tensor-parallel group: one process, or all processes of torch.distributed."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError
from ..third_party import started_by_torchrun, told


def initialize_model_parallel(tp_degree: int, device: torch.device) -> None:
    """Joins the processes that torchrun started. Raises ConfigError unless there are `tp_degree` of them."""
    processes = started_by_torchrun()
    if dist.is_initialized():
        processes = dist.get_world_size()
    if processes != tp_degree:
        raise ConfigError(
            f"tp_degree {tp_degree} needs {tp_degree} processes, but there is {processes}: "
            f"start with torchrun --nproc-per-node {tp_degree}"
        )
    if processes > 1 and not dist.is_initialized():
        with told("the processes cannot meet; start them with torchrun", ValueError, dist.DistError):
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


def all_gather(tensor: Tensor, dim: int = -1) -> Tensor:
    """The ranks' tensors side by side along one axis."""
    if tensor_parallel_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(tensor_parallel_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=dim)


def is_split(x: Tensor) -> bool:
    """Whether sequence parallelism splits x [B, S, H]: prompts are split, a decoding step (one token) never is."""
    return tensor_parallel_size() > 1 and x.shape[1] > 1


def gather_sequence(x: Tensor) -> Tensor:
    """All tokens, from the ranks' parts of the sequence axis: [B, S/TP, H] to [B, S, H]."""
    return all_gather(x, dim=1) if is_split(x) else x


def split_sequence(x: Tensor) -> Tensor:
    """This rank's part of the sequence axis: [B, S, H] to [B, S/TP, H]."""
    return x.chunk(tensor_parallel_size(), dim=1)[tensor_parallel_rank()] if is_split(x) else x


def own_tokens(tokens: Tensor) -> Tensor:
    """This rank's rows of tokens that all ranks have: [T, H] to [T/TP, H]."""
    return tokens.chunk(tensor_parallel_size())[tensor_parallel_rank()]


def reduce(x: Tensor, sequence_parallel: bool) -> Tensor:
    """The sum of the ranks' x [B, S, H]; with sequence parallelism, this rank's part of it."""
    return split_sequence(all_reduce(x)) if sequence_parallel else all_reduce(x)


def rank_of(model: nn.Module) -> Tensor:
    """This rank's number, int32 [1], where the model's weights are."""
    device = next(model.parameters()).device
    return torch.tensor([tensor_parallel_rank()], dtype=torch.int32, device=device)


class ProcessShardGroup:
    """The `size` adjacent ranks that share a latent cache."""

    def __init__(self, size: int):
        self.size = size
        self._group = None  # all ranks
        if size < tensor_parallel_size():
            self._group, _ = dist.new_subgroups(size)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors side by side along one axis."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return torch.cat(parts, dim=dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """The sum of the ranks' tensors: of one axis, this rank's part. (gloo has no such operation.)"""
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x.chunk(self.size, dim=dim)[tensor_parallel_rank() % self.size]


@functools.cache
def shard_group(size: int) -> ProcessShardGroup:
    """Called by all ranks. One for all layers."""
    return ProcessShardGroup(size)
