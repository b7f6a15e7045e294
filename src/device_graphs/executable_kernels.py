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
_SCALES = ("gate_up_proj_scale", "down_proj_scale")
_BIASES = ("gate_up_proj_bias", "down_proj_bias")
_CLAMPS = ("gate_clamp_upper_limit", "gate_clamp_lower_limit", "up_clamp_upper_limit", "up_clamp_lower_limit")


def rms_norm(x: Tensor, weight: Tensor, eps: float, dim: int) -> Tensor:
    """x float32; normalised over `dim`, which is the last one."""
    variance = x.square().mean(dim, keepdim=True)
    return weight.to(x.dtype) * (x * torch.rsqrt(variance + eps))


def blockwise_matmul(args: Any) -> Tensor:
    """As scaled_blockwise_matmul, for the kernel that takes scales and leaves them out: they are refused."""
    _refuse(args, _SCALES)
    return scaled_blockwise_matmul(args)


def scaled_blockwise_matmul(args: Any) -> Tensor:
    """args: NxD's BlockwiseMatmulArgs. Adds up, for every token [T, H], what the experts of its blocks compute.

    Rows of a block that hold no token are -1, or T with a further row of zeros among the tokens. Scales, float32 of E
    rows of 2I and H values, multiply what comes out of FP8 weights.
    """
    _check_supported(args)
    hidden_TH, experts_N = args.hidden_states, args.block_to_expert.long()
    gate_up_EHcI, down_EIH = args.gate_up_proj_weight, args.down_proj_weight
    tokens_NB = args.token_position_to_id.long().view(len(experts_N), args.block_size)
    is_token_NB1 = (tokens_NB >= 0).unsqueeze(-1)
    tokens_NB = tokens_NB.clamp(min=0)
    affinities_TE = args.expert_affinities_masked.view(len(hidden_TH), -1)
    dtype = hidden_TH.dtype
    gate_up = torch.einsum("nbh,nhci->nbci", hidden_TH[tokens_NB], gate_up_EHcI[experts_N].to(dtype))
    gate_NBI, up_NBI = _scaled(gate_up.flatten(2), args.gate_up_proj_scale, experts_N).chunk(2, dim=-1)
    expert_NBH = torch.einsum("nbi,nih->nbh", F.silu(gate_NBI) * up_NBI, down_EIH[experts_N].to(dtype))
    expert_NBH = _scaled(expert_NBH, args.down_proj_scale, experts_N)
    scale_NB1 = affinities_TE[tokens_NB, experts_N.unsqueeze(-1)].unsqueeze(-1)
    scaled_NBH = torch.where(is_token_NB1, expert_NBH * scale_NB1, 0).to(args.output.dtype)
    return torch.zeros_like(args.output).index_add(0, tokens_NB.flatten(), scaled_NBH.flatten(0, 1))


def _scaled(x_NBC: Tensor, scale: Tensor | None, experts_N: Tensor) -> Tensor:
    """Multiplies in float32 with the scales of each block's expert, one for each of C channels."""
    if scale is None:
        return x_NBC
    scale_EC = scale.reshape(len(scale), x_NBC.shape[-1])
    return (x_NBC.to(torch.float32) * scale_EC[experts_N].unsqueeze(1)).to(x_NBC.dtype)


def _check_supported(args: Any) -> None:
    """Refuses what the form above would leave out."""
    _refuse(args, _BIASES + _CLAMPS)
    if args.kernel_act_fn != _SILU:
        raise DeviceGraphError(f"the expert kernel runs here with SiLU alone, not with {args.kernel_act_fn}")
    scaling = args.expert_affinities_scaling_mode
    if str(scaling).rpartition(".")[2] not in _POST_SCALE:  # a member of an enumeration or of its stand-in
        raise DeviceGraphError(f"the expert kernel runs here with affinities that scale its output, not {scaling}")


def _refuse(args: Any, options: tuple[str, ...]) -> None:
    given = [name for name in options if getattr(args, name) is not None]
    if given:
        raise DeviceGraphError(f"the expert kernel runs here without {', '.join(given)}")


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
