"""What the Neuron kernels compute, in torch that lowers to plain XLA: static, and no custom call.

Shape suffixes: T tokens, H hidden, E experts, I intermediate on this rank, N blocks, B block size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DeviceGraphError
from . import rank_zero

# What NxD passes its expert kernels: SiLU, and affinities that scale the expert's output.
_SILU, _POST_SCALE = 0, ("POST_SCALE", "1")


def rms_norm(x: Tensor, weight: Tensor, eps: float, dim: int) -> Tensor:
    """x float32; normalised over `dim`, which is the last one."""
    variance = x.square().mean(dim, keepdim=True)
    return weight.to(x.dtype) * (x * torch.rsqrt(variance + eps))


def blockwise_matmul(args: Any) -> Tensor:
    """args: NxD's BlockwiseMatmulArgs. Adds up, for every token [T, H], what the experts of its blocks compute.

    Rows of a block that hold no token are -1, or T with a further row of zeros among the tokens.
    """
    _check_supported(args)
    hidden_TH, experts_N = args.hidden_states, args.block_to_expert.long()
    gate_up_EHcI, down_EIH = args.gate_up_proj_weight, args.down_proj_weight
    tokens_NB = args.token_position_to_id.long().view(len(experts_N), args.block_size)
    is_token_NB1 = (tokens_NB >= 0).unsqueeze(-1)
    tokens_NB = tokens_NB.clamp(min=0)
    affinities_TE = args.expert_affinities_masked.view(len(hidden_TH), -1)
    gate_up = torch.einsum("nbh,nhci->nbci", hidden_TH[tokens_NB], gate_up_EHcI[experts_N])
    gate_NBI, up_NBI = gate_up.unbind(2)
    expert_NBH = torch.einsum("nbi,nih->nbh", F.silu(gate_NBI) * up_NBI, down_EIH[experts_N])
    scale_NB1 = affinities_TE[tokens_NB, experts_N.unsqueeze(-1)].unsqueeze(-1)
    scaled_NBH = torch.where(is_token_NB1, expert_NBH * scale_NB1, 0).to(args.output.dtype)
    return torch.zeros_like(args.output).index_add(0, tokens_NB.flatten(), scaled_NBH.flatten(0, 1))


def _check_supported(args: Any) -> None:
    """Refuses what the form above would leave out."""
    optional = ("gate_up_proj_bias", "down_proj_bias", "gate_up_proj_scale", "down_proj_scale")
    limits = ("gate_clamp_upper_limit", "gate_clamp_lower_limit", "up_clamp_upper_limit", "up_clamp_lower_limit")
    given = [name for name in (*optional, *limits) if getattr(args, name) is not None]
    if args.kernel_act_fn != _SILU or given:
        raise DeviceGraphError(f"the expert kernel runs here with SiLU alone, not with {given or args.kernel_act_fn}")
    scaling = args.expert_affinities_scaling_mode
    if str(scaling).rpartition(".")[2] not in _POST_SCALE:  # a member of an enumeration or of its stand-in
        raise DeviceGraphError(f"the expert kernel runs here with affinities that scale its output, not {scaling}")


def fill_prefix(cache: Tensor, prefix: Tensor) -> Tensor:
    filled = cache.clone()
    filled[tuple(map(slice, prefix.shape))] = prefix
    return filled


def argmax(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return torch.argmax(x, dim, keepdim)


def cascaded_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its index, each [B, 1], of x [B, V]."""
    values, index = torch.max(x, dim=-1, keepdim=True)
    return values, index


def top_k(x: Tensor, k: int, dim: int = -1, sorted_flag: bool = True) -> tuple[Tensor, Tensor]:
    """In descending order, whether or not that was asked for."""
    values, index = torch.topk(x, k, dim=dim)
    return values, index


def cumsum(x: Tensor, axis: int) -> Tensor:
    return torch.cumsum(x, axis)


def rand_like(x: Tensor) -> Tensor:
    """Drawn anew for each call of the graph, and the same on all ranks."""
    return torch.empty_like(x) if x.is_meta else rank_zero.random_input(x)


def identity(*args: Tensor) -> Any:
    return args[0] if len(args) == 1 else args
