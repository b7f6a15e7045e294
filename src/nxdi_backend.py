"""The surface of the seam on real NxD and NxDI."""

import copy
from typing import Any

from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed.parallel_layers.mappings import gather_from_sequence_parallel_region
from neuronx_distributed.utils import cpu_mode
from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.custom_calls import CustomRMSNorm
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


def gather_sequence(x: Tensor) -> Tensor:
    """All tokens, from the ranks' parts of the sequence axis: [B, S/TP, H] to [B, S, H]."""
    return gather_from_sequence_parallel_region(x, sequence_dimension=1, to_model_parallel=False)


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
    return moe


def _with_scales(neuron_config: Any) -> Any:
    """The config of the expert matmul; for the kernel that applies scales of channels, with the class that passes
    them."""
    matmul = neuron_config.blockwise_matmul_config
    if neuron_config.weights == FP8.name and matmul.use_shard_on_intermediate_dynamic_while:
        matmul = copy.copy(matmul)
        matmul.blockwise_nki_autograd_cls = ScaledExpertMatmul
    return matmul
