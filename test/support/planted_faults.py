"""Mistakes that were made in real ports of this model, to be planted in ours. Each takes (monkeypatch, model)."""

import torch
from nxdi_deepseek import modeling_deepseek
from nxdi_deepseek import router as router_module
from nxdi_deepseek.accuracy.runner import decoder_modules
from nxdi_deepseek.modeling_deepseek import DeepseekV3Attention
from nxdi_deepseek.rope_util import DeepseekV3RotaryEmbedding


def rope_not_interleaved(monkeypatch, model):
    """Rotates the pairs (x[i], x[i + D/2])."""

    def rotate_halves(x, cos, sin):
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)

    monkeypatch.setattr(modeling_deepseek, "rotate_interleaved", rotate_halves)


def mscale_missing(monkeypatch, model):
    config = model.config
    for module in decoder_modules(model):
        for layer in module.layers:
            layer.self_attn.softmax_scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5


def router_bias_in_bfloat16(monkeypatch, model):
    for router in _routers(model):
        router.e_score_correction_bias.data = router.e_score_correction_bias.data.bfloat16().float()


def masked_groups_as_zero(monkeypatch, model):
    select = router_module.select_experts

    def select_with_zero(scores, bias, top_k, n_group, topk_group, grouping):
        # With -inf, all experts of the chosen groups in their order; the ruled-out ones then get the score 0.
        eligible = select(scores, bias, scores.shape[-1] // n_group * topk_group, n_group, topk_group, grouping)
        choice = torch.zeros_like(scores).scatter(-1, eligible, (scores + bias).gather(-1, eligible))
        return choice.topk(top_k, dim=-1).indices

    monkeypatch.setattr(router_module, "select_experts", select_with_zero)


def kv_b_split_at_v_head_dim(monkeypatch, model):
    """Values from row v_head_dim of each head on; keys are right. Needs qk_nope_head_dim > v_head_dim."""
    split, nope_dim, v_dim = torch.Tensor.tensor_split, model.config.qk_nope_head_dim, model.config.v_head_dim

    def wrong_split(tensor, ends, dim=0):
        parts = split(tensor, ends, dim)
        is_kv_b = tensor.shape[dim] == nope_dim + v_dim and tuple(ends) == (nope_dim,)
        return (parts[0], tensor.narrow(dim, v_dim, v_dim)) if is_kv_b else parts

    prefill, decode = DeepseekV3Attention._prefill, DeepseekV3Attention._decode

    def patched(method):
        def call(*args):
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "tensor_split", wrong_split)
                return method(*args)

        return call

    monkeypatch.setattr(DeepseekV3Attention, "_prefill", patched(prefill))
    monkeypatch.setattr(DeepseekV3Attention, "_decode", patched(decode))


SWAPPED_EXPERT = 5


def gate_and_up_swapped(monkeypatch, model):
    """In one expert of the second expert layer."""
    for module in decoder_modules(model):
        weight = module.layers[2].mlp.expert_mlps.mlp_op.gate_up_proj.weight.data
        weight[SWAPPED_EXPERT] = weight[SWAPPED_EXPERT].roll(weight.shape[-1] // 2, dims=-1)


def positions_of_the_first_sequence(monkeypatch, model):
    forward = DeepseekV3RotaryEmbedding.forward
    monkeypatch.setattr(
        DeepseekV3RotaryEmbedding, "forward", lambda self, positions: forward(self, positions[:1].expand_as(positions))
    )


def _routers(model):
    for module in decoder_modules(model):
        for layer in module.layers:
            if layer.is_moe:
                yield layer.mlp.router


# Fault -> the module that must be named.
FAULTS = {
    rope_not_interleaved: "layers.0.self_attn.k_pe",
    mscale_missing: "layers.0.self_attn.heads",
    router_bias_in_bfloat16: "layers.1.mlp.router.scores",
    masked_groups_as_zero: "layers.1.mlp.router.weights",
    kv_b_split_at_v_head_dim: "layers.0.self_attn.heads",
    gate_and_up_swapped: "layers.2.mlp.experts",
    positions_of_the_first_sequence: "layers.0.self_attn.k_pe",
}
