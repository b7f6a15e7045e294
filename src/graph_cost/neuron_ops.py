"""The form in which graph-cost counts Neuron kernels: custom calls. device_graphs/kernel_table.py says where they go.

The same custom call as on Neuron where the compiler expands it (RMS norm), a marker with its sizes where it is an
opaque kernel (the blockwise expert matmul). On the meta device each gives a result of the right shape.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import BLOCKWISE_MATMUL, RMS_NORM


def replace_collectives() -> None:
    """Collectives on the meta device, which torch_xla does not know."""
    import torch_xla.core.xla_model as xm

    for name, on_meta in {"all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _scatter}.items():
        setattr(xm, name, _dispatch(on_meta, getattr(xm, name)))


def custom_call(target: str, inputs: Sequence[Tensor], like: Tensor, config: dict[str, Any] | None = None) -> Tensor:
    """An opaque operation on `inputs` whose result has the shape and dtype of `like`."""
    if like.is_meta:
        return torch.empty_like(like)
    import torch_xla

    shape, text = list(like.shape), json.dumps(config or {})
    return torch_xla._XLAC._xla_custom_call(list(inputs), target, [shape], [like.dtype], False, text, 0, {})[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dim: int) -> Tensor:
    return custom_call(RMS_NORM, (x, weight), like=x)


def blockwise_matmul(args: Any, sharded_by: str = "block") -> Tensor:
    """args: NxD's BlockwiseMatmulArgs. The kernel adds to `output` what every block's expert computes.

    sharded_by: what its two cores share out: blocks, intermediate or hidden.
    """
    inputs = (args.hidden_states, args.expert_affinities_masked, args.gate_up_proj_weight, args.down_proj_weight)
    mapping = (args.token_position_to_id, args.block_to_expert)
    _, intermediate, hidden = args.down_proj_weight.shape
    skip_token, skip_weight = args.skip_dma
    sizes = {"blocks": len(args.block_to_expert), "block_size": args.block_size}
    sizes |= {"hidden": hidden, "intermediate": intermediate, "sharded_by": sharded_by}
    # Without skip_token, NxD adds a row of zeros for the rows of blocks that hold no token.
    sizes |= {"tokens": len(args.hidden_states) - (not skip_token)}
    sizes |= {"skip_token": bool(skip_token), "skip_weight": bool(skip_weight)}
    return custom_call(BLOCKWISE_MATMUL, (*inputs, *mapping), like=args.output, config=sizes)


def _dispatch(on_meta: Callable[..., Any], on_xla: Callable[..., Any]) -> Callable[..., Any]:
    def collective(*args: Any, **kwargs: Any) -> Any:
        tensors = [*args, *kwargs.values()]
        tensors += [item for value in tensors if isinstance(value, list) for item in value]
        is_meta = any(isinstance(value, Tensor) and value.is_meta for value in tensors)
        return (on_meta if is_meta else on_xla)(*args, **kwargs)

    return collective


def _all_reduce(reduce_type: str, inputs: Any, **_: Any) -> Any:
    return inputs


def _all_gather(value: Tensor, dim: int = 0, groups: Any = None, **_: Any) -> Tensor:
    return torch.cat([value] * len(groups[0]), dim)


def _scatter(reduce_type: str, input: Tensor, scatter_dim: int, shard_count: int, output: Tensor, **_: Any) -> Tensor:
    return output
