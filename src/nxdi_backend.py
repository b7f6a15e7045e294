"""The surface of the seam on real NxD and NxDI."""

import copy
import functools
from typing import Any

import torch
from neuronx_distributed.modules.moe.expert_mlps_v2 import ExpertMLPsV2
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed.parallel_layers.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region_with_dim,
    reduce_scatter_to_tensor_model_parallel_region_with_dim,
    scatter_to_process_group_spmd,
)
from neuronx_distributed.parallel_layers.parallel_state import (
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_replica_groups,
)
from neuronx_distributed.utils import cpu_mode
from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig, InferenceConfig, MoENeuronConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.custom_calls import CustomRMSNorm
from neuronx_distributed_inference.modules.kvcache.block_kv_cache_manager import BlockKVCacheManager
from neuronx_distributed_inference.modules.kvcache.kv_cache_manager import KVCacheManager
from neuronx_distributed_inference.modules.moe_v2 import initialize_moe_module
from torch import Tensor, nn

from .embedded.modules import RMSNorm
from .nxdi_experts import ScaledExpertMatmul, quantize_experts
from .nxdi_generation import NxDIGenerationAdapter as HuggingFaceGenerationAdapter
from .weight_forms import FP8


def rmsnorm_cls() -> type[nn.Module]:
    """NxDI's norm is a Neuron custom call, which its CPU mode cannot run."""
    return RMSNorm if cpu_mode() else CustomRMSNorm


def gather_columns(x: Tensor) -> Tensor:
    """The ranks' parts of the last axis, side by side."""
    return gather_from_tensor_model_parallel_region(x)


def gather_sequence(x: Tensor) -> Tensor:
    """All tokens, from the ranks' parts of the sequence axis: [B, S/TP, H] to [B, S, H]."""
    return gather_from_sequence_parallel_region(x, sequence_dimension=1, to_model_parallel=False)


def rank_of(model: nn.Module) -> Tensor:
    """This rank's number, int32 [1]. All ranks run one graph, so that it is one of the model's weights."""
    return model.rank_util.get_rank()


class NxDShardGroup:
    """The `size` adjacent ranks that share a latent cache: on trn2, at size 4, the logical cores of one chip."""

    def __init__(self, whole: Any, size: int):
        self.size = size
        self._group = whole if whole.size() == size else _adjacent_ranks(size)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors side by side along one axis."""
        return gather_from_tensor_model_parallel_region_with_dim(x, dim, self._group)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """The sum of the ranks' tensors: of one axis, this rank's part."""
        return reduce_scatter_to_tensor_model_parallel_region_with_dim(x, dim, self._group)


def shard_group(size: int) -> NxDShardGroup:
    """Called by all ranks. One for all layers."""
    return _shard_group(get_tensor_model_parallel_group(), size)


_shard_group = functools.cache(NxDShardGroup)


def _adjacent_ranks(size: int) -> Any:
    """A process group, made as NxD makes its own. The one that it has for shared keys outlives its other groups."""
    mesh = [
        ranks[first : first + size]
        for ranks in get_tensor_model_parallel_replica_groups()
        for first in range(0, len(ranks), size)
    ]
    own = torch.distributed.get_rank()
    if cpu_mode():  # every rank takes part in making each group
        made = {tuple(ranks): torch.distributed.new_group(ranks, backend="gloo") for ranks in mesh}
        return next(group for ranks, group in made.items() if own in ranks)
    ranks = next(ranks for ranks in mesh if own in ranks)
    return torch.distributed.new_group(ranks, pg_options={"xla_pg_options": {"mesh": mesh}})


def _own_tokens(spmd_rank: nn.Module, tokens: Tensor) -> Tensor:
    """This rank's rows of tokens that all ranks have: [T, H] to [T/TP, H]. All ranks run one graph, so that the rank's
    number is one of its weights."""
    return scatter_to_process_group_spmd(tokens, partition_dim=0, rank=spmd_rank.get_rank())


def _block_map(**sizes: Any) -> tuple[Tensor, Tensor]:
    """NxD's map of blocks to experts and tokens, the latter as a tensor of its own.

    NxD reduces it over the ranks in place, in a view. Where torch_xla runs with functionalization, a view of that view
    shows the values ahead of the reduction: this rank's tokens alone.
    """
    block_to_expert, token_position_to_id = ExpertMLPsV2.get_blockwise_expert_and_token_mapping(**sizes)
    return block_to_expert, token_position_to_id.clone()


def build_moe(config: Any, router: nn.Module) -> nn.Module:
    """NxD's MoE module for routed and shared experts, with `router` in the place of its own.

    The router returns final mixing weights, so NxD must not normalise them again.
    """
    moe_config = copy.copy(config)
    moe_config.neuron_config = neuron_config = copy.copy(config.neuron_config)
    neuron_config.normalize_top_k_affinities = False
    neuron_config.blockwise_matmul_config = _with_scales(neuron_config)
    moe_config.num_local_experts = config.model.n_routed_experts
    moe_config.intermediate_size = config.model.moe_intermediate_size
    moe = initialize_moe_module(moe_config)
    moe.router = router
    if neuron_config.quantized:
        quantize_experts(moe.expert_mlps, neuron_config)
    moe.expert_mlps.get_blockwise_expert_and_token_mapping = _block_map
    if hasattr(moe.expert_mlps, "spmd_rank"):  # not without parallelize_token_to_block_mapping
        router.own_tokens = functools.partial(_own_tokens, moe.expert_mlps.spmd_rank)
    return moe


def with_draft(config: Any, draft: Any, model_cls: type[nn.Module]) -> Any:
    """The config of a model that NxDI's NeuronFusedSpecModel makes of `model_cls`, with that of its draft."""
    path = getattr(config, "_name_or_path", None)
    config.fused_spec_config = FusedSpecNeuronConfig(model_cls, draft_config=draft, draft_model_path=path)
    return config


def _with_scales(neuron_config: Any) -> Any:
    """The config of the expert matmul; for the kernel that applies scales of channels, with the class that passes
    them."""
    matmul = neuron_config.blockwise_matmul_config
    if neuron_config.weights == FP8.name and matmul.use_shard_on_intermediate_dynamic_while:
        matmul = copy.copy(matmul)
        matmul.blockwise_nki_autograd_cls = ScaledExpertMatmul
    return matmul
