"""Routed and shared experts. Module and parameter names are those of NxD's MoE."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parallel_layers import ColumnParallelLinear, RowParallelLinear
from .parallel_state import gather_sequence, own_tokens, reduce, tensor_parallel_size


class ExpertWeights(nn.Module):
    """The weights of one projection of all experts, fused: [experts, input, output]."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Experts(nn.Module):
    """SwiGLU experts; the intermediate axis is split over the ranks, [gate | up] side by side on each."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype):
        super().__init__()
        width = intermediate_size // tensor_parallel_size()
        self.gate_up_proj = ExpertWeights((num_experts, hidden_size, 2 * width), dtype)
        self.down_proj = ExpertWeights((num_experts, width, hidden_size), dtype)

    def forward(self, hidden_states: Tensor, expert: int) -> Tensor:
        gate, up = (hidden_states @ self.gate_up_proj.weight[expert]).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down_proj.weight[expert]


class ExpertMLPs(nn.Module):
    """Sums each token's chosen experts. Only experts that some token chose are computed, on just those tokens."""

    def __init__(self, *shape: int, dtype: torch.dtype):
        super().__init__()
        self.mlp_op = Experts(*shape, dtype=dtype)

    def forward(self, hidden_states: Tensor, expert_affinities: Tensor, expert_index: Tensor) -> Tensor:
        """hidden_states [T, H], expert_affinities [T, E] final weights, expert_index [T, K]. Returns [T, H]."""
        experts, order = expert_index.flatten().sort(stable=True)
        tokens = order // expert_index.shape[1]
        grouped = hidden_states[tokens]  # [T * K, H], the tokens of each expert next to each other
        start = 0
        for expert, count in zip(*(x.tolist() for x in experts.unique_consecutive(return_counts=True)), strict=True):
            group = slice(start, start + count)
            grouped[group] = self.mlp_op(grouped[group], expert)
            start += count
        grouped *= expert_affinities[tokens, experts, None]
        return torch.zeros_like(hidden_states).index_add_(0, tokens, grouped)


class SharedExperts(nn.Module):
    """Experts that every token uses, as one wide SwiGLU; returns this rank's part of the sum."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype):
        super().__init__()
        column = {"bias": False, "gather_output": False, "dtype": dtype}
        self.gate_proj = ColumnParallelLinear(hidden_size, intermediate_size, **column)
        self.up_proj = ColumnParallelLinear(hidden_size, intermediate_size, **column)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias=False, dtype=dtype, reduce_output=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoE(nn.Module):
    """Router, routed experts and shared experts; one reduction for all of them."""

    def __init__(
        self, router: nn.Module, expert_mlps: nn.Module, shared_experts: nn.Module | None, sequence_parallel: bool
    ):
        super().__init__()
        self.router, self.expert_mlps, self.shared_experts = router, expert_mlps, shared_experts
        self.sequence_parallel = sequence_parallel

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor]:
        """hidden_states [B, S, H], or this rank's part of S. Returns a tuple, as NxD's MoE does, output first."""
        if self.sequence_parallel:
            hidden_states = gather_sequence(hidden_states)
        tokens = hidden_states.flatten(0, 1)
        _, expert_affinities, expert_index = self.router(hidden_states)
        output = self.expert_mlps(tokens, expert_affinities, expert_index)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return (reduce(output.view_as(hidden_states), self.sequence_parallel),)


def build_moe(config: Any, router: nn.Module) -> MoE:
    """The MoE module of one layer, with the given router."""
    dtype, hidden, width = config.neuron_config.torch_dtype, config.hidden_size, config.moe_intermediate_size
    router.own_tokens = own_tokens
    experts = ExpertMLPs(config.n_routed_experts, hidden, width, dtype=dtype)
    shared = SharedExperts(hidden, width * config.n_shared_experts, dtype) if config.n_shared_experts else None
    return MoE(router, experts, shared, config.neuron_config.sequence_parallel_enabled)
