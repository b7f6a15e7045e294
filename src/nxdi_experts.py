"""NxD's routed experts with FP8 weights: its quantized layers, and a way for scales into the prompts' expert kernel."""

from typing import Any

import torch
from neuronx_distributed.modules.moe.blockwise import BlockwiseMatmulNKIFunc
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.quantization import quantization_config as nxd
from neuronx_distributed.quantization.quantize import convert
from neuronx_distributed.utils import cpu_mode
from torch import Tensor, nn
from torch.func import functional_call

_Type = nxd.QuantizationType


def quantize_experts(expert_mlps: nn.Module, neuron_config: Any) -> None:
    """Gives the experts' layers FP8 weights and float32 scales, as NxDI does where it traces a model.

    NxDI's CPU mode leaves that out, and would read the codes as if they were the weights.
    """
    traces = parallel_state.get_aot_mode()
    # Else NxD cuts a rank's part out of zeros of a wrong shape, and fails on some ranks.
    parallel_state.set_aot_mode(True)
    try:
        convert(expert_mlps, q_config=_layer_config(neuron_config), inplace=True)
    finally:
        parallel_state.set_aot_mode(traces)
    for module in expert_mlps.modules():
        module._parameters.pop("master_weight", None)  # a second name that tracing gives a layer's weight
        if cpu_mode() and "scale" in module._parameters:
            _take_rows_of_bytes(module)


def _take_rows_of_bytes(layer: nn.Module) -> None:
    """NxD's layer takes the chosen experts from FP8 tensors, which torch 2.8 does not do on the CPU."""
    forward = layer.forward

    def forward_of_chosen(x: Tensor, expert_indices: Tensor | None = None) -> Tensor:
        if expert_indices is None:
            return forward(x)
        weight = layer.weight.view(torch.int8)[expert_indices].view(layer.weight.dtype)
        return functional_call(layer, {"weight": weight, "scale": layer.scale[expert_indices]}, (x,))

    layer.forward = forward_of_chosen


def _layer_config(neuron_config: Any) -> dict[str, Any]:
    if _Type(neuron_config.quantization_type) is _Type.BLOCKWISE_SYMMETRIC:
        config = nxd.get_default_blockwise_custom_qconfig_dict()
        config["block_axis"] = neuron_config.quantization_block_axis
        config["block_size"] = neuron_config.quantization_block_size
    else:
        config = nxd.get_default_expert_wise_per_channel_custom_qconfig_dict()
    return config | {"quantized_dtype": nxd.QuantizedDtype.get_dtype(neuron_config.quantization_dtype)}


class ScaledExpertMatmul(BlockwiseMatmulNKIFunc):
    """NxD's expert matmul for prompts, whose kernel multiplies with the scales of channels.

    NxD dequantizes all experts of a layer ahead of the kernel, as soon as scales have three axes. Scales of channels,
    [E, 1, 2I] and [E, 1, H], are passed without the axis of size 1: the same values in the same order, and the kernel
    goes by their order.
    Only the kernel sharded over the intermediate axis applies scales. The one sharded over blocks takes them and leaves
    them out, in every version of NKI's library that is public.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        affinities: Tensor,
        gate_up: Tensor,
        down: Tensor,
        positions: Tensor,
        block_to_expert: Tensor,
        gate_up_scale: Tensor,
        down_scale: Tensor,
        *options: Any,
    ) -> Tensor:
        inputs = (hidden_states, affinities, gate_up, down, positions, block_to_expert)
        scales = (gate_up_scale.squeeze(1), down_scale.squeeze(1))
        return BlockwiseMatmulNKIFunc.forward(ctx, *inputs, *scales, *options)
