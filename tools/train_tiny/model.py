"""DeepSeek-V3 for training, in plain PyTorch: MLA, DeepSeekMoE with bias balancing, one MTP module.

Section numbers are those of the DeepSeek-V3 report, arXiv:2412.19437. Parameters carry their Hugging Face names, except
that the experts of a layer are stacked (`checkpoint.py` splits them). The config is the released config.json.
Shapes: B batch, S positions, T = B*S, H hidden, N heads, E experts, K experts per token, I expert width, V vocabulary.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

CONFIG_FILE = Path(__file__).with_name("config.json")


def load_config(path=CONFIG_FILE):
    """config.json with attribute access; rope_scaling stays a dict."""
    return SimpleNamespace(**json.loads(Path(path).read_text()))


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def yarn_mscale(factor, mscale):
    """YaRN's attention temperature (arXiv:2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_frequencies(config):
    """[D_rope / 2] angular frequencies: slow ones divided by the factor, fast ones kept, a linear ramp between."""
    scaling, dim = config.rope_scaling, config.qk_rope_head_dim

    def pair_turning(rotations):
        """The (fractional) index of the pair that turns this often within the original context."""
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(scaling["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = config.rope_theta ** (-torch.arange(0, dim, 2) / dim)
    return frequencies * (1 - ramp) + frequencies / scaling["factor"] * ramp


class Rotary(nn.Module):
    """cos and sin tables; plain RoPE first, YaRN once `extend` is called (sec. 4.3: extension follows pre-training)."""

    def __init__(self, config, yarn):
        super().__init__()
        self.config = config
        self.qk_scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        if yarn:
            self.extend()
        else:
            pairs = torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim
            self.fill(config.rope_theta**-pairs, 1.0)

    def fill(self, frequencies, magnitude):
        device = self.cos.device if self.cos is not None else None
        angles = torch.outer(torch.arange(self.config.max_position_embeddings), frequencies)  # [positions, D_rope / 2]
        self.cos = (angles.cos() * magnitude).to(device)
        self.sin = (angles.sin() * magnitude).to(device)

    def extend(self):
        """Switch to YaRN: frequencies, the magnitude of cos and sin, and the softmax scale."""
        scaling = self.config.rope_scaling
        all_dim = yarn_mscale(scaling["factor"], scaling["mscale_all_dim"])
        self.fill(yarn_frequencies(self.config), yarn_mscale(scaling["factor"], scaling["mscale"]) / all_dim)
        self.qk_scale = (self.config.qk_nope_head_dim + self.config.qk_rope_head_dim) ** -0.5 * all_dim**2

    def forward(self, x):
        """Rotate neighbouring pairs (interleaved layout): x [B, N, S, D_rope]."""
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]  # float32, whatever the dtype of x
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention (sec. 2.1.1), in its expanded form."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.nope, self.rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        hidden, heads = config.hidden_size, self.heads
        self.q_a_proj = linear(hidden, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = linear(config.q_lora_rank, heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(hidden, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, config.rms_norm_eps)
        self.kv_b_proj = linear(self.latent, heads * (self.nope + self.value))
        self.o_proj = linear(heads * self.value, hidden)

    def split_heads(self, x):
        """[B, S, N * D] -> [B, N, S, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, rotary):
        q = self.split_heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), dim=-1)
        k_nope, v = self.split_heads(self.kv_b_proj(self.kv_a_layernorm(latent))).split((self.nope, self.value), dim=-1)
        k_rope = rotary(k_rope.unsqueeze(1)).expand(-1, self.heads, -1, -1)  # one rotary key for all heads
        q, k = torch.cat((q_nope, rotary(q_rope)), dim=-1), torch.cat((k_nope, k_rope), dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rotary.qk_scale)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: the dense layers' feed-forward, and the shared expert."""

    def __init__(self, config, width):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, width)
        self.up_proj = linear(config.hidden_size, width)
        self.down_proj = linear(width, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Sigmoid router with node-limited top-k and auxiliary-loss-free balancing (sec. 2.1.2), in float32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)  # tokens seen per expert

    def select(self, scores):
        """Experts of each token: scores [T, E] -> indices [T, K], from the best topk_group of n_group groups."""
        groups = self.config.n_group
        choice = (scores + self.e_score_correction_bias).unflatten(-1, (groups, -1))  # [T, G, E / G]
        group_scores = choice.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(self.config.topk_group, dim=-1).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
        choice = choice.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(-2)
        return choice.topk(self.config.num_experts_per_tok, dim=-1).indices

    def forward(self, x):
        """x [T, H] -> weights [T, E], zero for the experts that were not chosen."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            indices = self.select(scores)
            self.load += torch.zeros_like(scores).scatter(1, indices, 1.0).sum(0)
        chosen = scores.gather(1, indices)  # the bias selects, the unbiased score weighs
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling_factor
        return torch.zeros_like(scores).scatter(1, indices, chosen)

    @torch.no_grad()
    def update_bias(self, speed):
        """Raise the bias of under-loaded experts, lower that of over-loaded ones, by `speed` (gamma)."""
        bias = self.e_score_correction_bias
        bias += speed * torch.sign(self.load.mean() - self.load)
        # A shift common to all experts changes no selection. With the smallest bias at 0 every biased score is
        # positive, so implementations that mask closed groups with 0 and those that use -inf choose alike.
        bias -= bias.min()
        self.load.zero_()


class Experts(nn.Module):
    """All E experts on all tokens as three matrix products. E is 16 here: cheaper than gathering, and static."""

    def __init__(self, config):
        super().__init__()
        self.shape = (config.n_routed_experts, config.moe_intermediate_size)
        self.gate_proj = nn.Parameter(torch.empty(*self.shape, config.hidden_size))
        self.up_proj = nn.Parameter(torch.empty(*self.shape, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.shape[0], config.hidden_size, self.shape[1]))

    def forward(self, x, weights):
        """x [T, H], weights [T, E] -> [T, H]."""
        gate, up = (F.linear(x, weight.flatten(0, 1)) for weight in (self.gate_proj, self.up_proj))  # [T, E * I]
        gated = (F.silu(gate) * up).unflatten(-1, self.shape) * weights.to(gate.dtype).unsqueeze(-1)
        return gated.flatten(-2) @ self.down_proj.transpose(1, 2).flatten(0, 1)


class MoE(nn.Module):
    """Routed experts plus one shared expert (sec. 2.1.2)."""

    def __init__(self, config):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        return self.experts(tokens, self.gate(tokens)).view_as(x) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, dense in the first layers."""

    def __init__(self, config, index, dropout):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config, config.intermediate_size) if index < config.first_k_dense_replace else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = dropout

    def forward(self, x, rotary):
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), rotary), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class MTPLayer(DecoderLayer):
    """The multi-token prediction module (sec. 2.2); embedding and output head are those of the main model."""

    def __init__(self, config, dropout):
        super().__init__(config, config.num_hidden_layers, dropout)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = linear(2 * hidden, hidden)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden, eps)})

    def forward(self, hidden, next_embeddings, rotary):
        """Main model's normed hidden states and embeddings of the next tokens, both [B, S, H] -> normed [B, S, H].

        eh_proj takes the embedding first, as the released weights do (the report writes the hidden state first).
        """
        x = self.eh_proj(torch.cat((self.enorm(next_embeddings), self.hnorm(hidden)), dim=-1))
        return self.shared_head["norm"](super().forward(x, rotary))


class Model(nn.Module):
    """Embedding, decoder layers with the MTP layer as the last of the list, final norm."""

    def __init__(self, config, dropout):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, index, dropout) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers + [MTPLayer(config, dropout)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TinyDeepseekV3(nn.Module):
    """The whole model: main logits and MTP logits of a window."""

    def __init__(self, config, dropout=0.0, yarn=True):
        super().__init__()
        self.dropout = dropout
        self.model = Model(config, dropout)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.rotary = Rotary(config, yarn)
        self.apply(lambda module: initialize(module, config))

    @property
    def gates(self):
        """The routers, in layer order, the MTP layer's last."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def forward(self, tokens):
        """tokens [B, S + 1] -> (logits [B, S, V] of tokens 1..S, MTP logits [B, S, V] of tokens 2..S+1)."""
        embeddings = F.dropout(self.model.embed_tokens(tokens), self.dropout, self.training)
        x = embeddings[:, :-1]
        for layer in self.model.layers[:-1]:
            x = layer(x, self.rotary)
        hidden = self.model.norm(x)
        mtp_hidden = self.model.layers[-1](hidden, embeddings[:, 1:], self.rotary)
        return self.lm_head(hidden), self.lm_head(mtp_hidden)


def initialize(module, config):
    """Normal weights of the config's initializer_range; norms keep their ones."""
    for weight in module.parameters(recurse=False):
        if not isinstance(module, RMSNorm):
            nn.init.normal_(weight, std=config.initializer_range)
