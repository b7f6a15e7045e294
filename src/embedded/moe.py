"""Routed and shared experts. Module and parameter names are those of NxD's MoE."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.fp8 import FP8_DTYPE
from ..weight_forms import DOWN, GATE_UP, weight_form
from .parallel_layers import ColumnParallelLinear, RowParallelLinear
from .parallel_state import gather_sequence, own_tokens, reduce, tensor_parallel_size


class ExpertWeights(nn.Module):
    """The weights of one projection of all experts, fused: [experts, input, output]."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [T, input]. Returns [T, output]."""
        return x @ self.weight[expert]


class Fp8ExpertWeights(ExpertWeights):
    """FP8 weights with float32 scales: of channels, [experts, 1, output], which multiply what comes out, or of blocks,
    [experts, input / rows, output / columns], with which weights are dequantized ahead. In both, as NxD's layers do."""

    def __init__(self, shape: tuple[int, int, int], scale_shape: tuple[int, int, int]):
        super().__init__(shape, FP8_DTYPE)
        self.scale = nn.Parameter(torch.empty(scale_shape, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        codes, scale = self.weight[expert], self.scale[expert]
        if scale.shape == (1, codes.shape[1]):
            return ((x @ _values(codes, x.dtype)).to(torch.float32) * scale).to(x.dtype)
        for axis, size in enumerate(codes.shape):
            scale = scale.repeat_interleave(size // scale.shape[axis], dim=axis)
        return x @ (_values(codes, torch.float32) * scale).to(x.dtype)


def _values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What finite codes stand for. torch converts them one by one; shifted, their bits are those of a float16 that is
    2^8 times smaller, and arithmetic on these is fast."""
    bits = (codes.view(torch.int8).to(torch.int16) << 7) & ~0x4000  # the sign is there twice
    return bits.view(torch.float16).to(dtype) * 2**8


class Experts(nn.Module):
    """SwiGLU experts; the intermediate axis is split over the ranks, [gate | up] side by side on each."""

    def __init__(self, config: Any):
        super().__init__()
        model = config.model
        experts, hidden = model.n_routed_experts, model.hidden_size
        width = model.moe_intermediate_size // tensor_parallel_size()
        self.gate_up_proj = _expert_weights(config, GATE_UP, (experts, hidden, 2 * width))
        self.down_proj = _expert_weights(config, DOWN, (experts, width, hidden))

    def forward(self, hidden_states: Tensor, expert: int) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states, expert).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up, expert)


def _expert_weights(config: Any, projection: str, shape: tuple[int, int, int]) -> ExpertWeights:
    neuron_config = config.neuron_config
    scale = weight_form(neuron_config.weights).scale(projection, config.model, neuron_config.tp_degree)
    if scale is None:
        return ExpertWeights(shape, neuron_config.torch_dtype)
    return Fp8ExpertWeights(shape, scale.rank_shape(neuron_config.tp_degree))


class ExpertMLPs(nn.Module):
    """Sums each token's chosen experts. Only experts that some token chose are computed, on just those tokens."""

    def __init__(self, config: Any):
        super().__init__()
        self.mlp_op = Experts(config)

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
    shared = SharedExperts(hidden, width * config.n_shared_experts, dtype) if config.n_shared_experts else None
    return MoE(router, ExpertMLPs(config), shared, config.neuron_config.sequence_parallel_enabled)
