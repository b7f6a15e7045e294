"""Linear layers and embedding whose weights are split over the tensor-parallel ranks. Weights stay uninitialised."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parallel_state import all_gather, reduce, tensor_parallel_size


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W split. Returns this rank's outputs, or all of them with `gather_output`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.gather_output = gather_output
        self.weight = nn.Parameter(torch.empty(output_size // tensor_parallel_size(), input_size, dtype=dtype), False)
        bias_size = output_size if gather_output else output_size // tensor_parallel_size()
        self.bias = nn.Parameter(torch.empty(bias_size, dtype=dtype), False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.gather_output:
            y = all_gather(y)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_rank W_rank^T, + b: the columns of W are split, and so is the input.

    With sequence parallelism each rank returns its own tokens of a prompt.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        dtype: torch.dtype = torch.float32,
        reduce_dtype: torch.dtype | None = None,
        reduce_output: bool = True,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int = 1,
    ):
        super().__init__()
        assert input_is_parallel and sequence_dimension == 1, "other layouts are not supported"
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.reduce_dtype, self.reduce_output = reduce_dtype or dtype, reduce_output
        self.weight = nn.Parameter(torch.empty(output_size, input_size // tensor_parallel_size(), dtype=dtype), False)
        self.bias = nn.Parameter(torch.empty(output_size, dtype=dtype), False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.reduce_output:
            y = reduce(y.to(self.reduce_dtype), self.sequence_parallel_enabled).to(x.dtype)
        return y if self.bias is None else y + self.bias


class ParallelEmbedding(nn.Module):
    """Token embedding with the hidden axis split."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        shard_across_embedding: bool = True,
    ):
        super().__init__()
        assert shard_across_embedding, "only the hidden axis can be split"
        width = embedding_dim // tensor_parallel_size()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width, dtype=dtype), False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return all_gather(F.embedding(input_ids, self.weight))
