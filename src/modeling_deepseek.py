"""DeepSeek-V3 for NeuronX Distributed Inference.

Written once against the surface of `backend`: inside NxDI this is the product, without it the same classes run on the
embedded runtime. Architecture: arXiv:2412.19437, section 2.1; attention: arXiv:2405.04434, section 2.1.

Shape suffixes: B batch, S query length, L cached length, H hidden, N heads on this rank, D qk_nope_head_dim,
P qk_rope_head_dim, V v_head_dim, R kv_lora_rank, E routed experts, K experts per token, T = B * S.

Tensors are cut by tensor_split: split gives wrong values on torch-neuronx, see device_graphs/process.py.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backend
from .config import DeepseekV3InferenceConfig, DeepseekV3NeuronConfig, load_pretrained_config
from .latent_cache import KeyValue, LatentKVCacheManager, PagedLatentKVCacheManager, latent_cache_manager
from .mla import absorbed_attention, expanded_attention, expands_prefix, query_growth
from .mtp import MTPInput
from .rope_util import DeepseekV3RotaryEmbedding, rotate_interleaved
from .router import DeepseekV3Router
from .sharded_attention import by_rank, gathered_rows, held_rows, rows_of, sharded_attention

if TYPE_CHECKING:
    from .application import NeuronDeepseekV3ForCausalLM

__all__ = [
    "DeepseekV3InferenceConfig",
    "DeepseekV3NeuronConfig",
    "load_pretrained_config",
    "LatentKVCacheManager",
    "PagedLatentKVCacheManager",
    "DeepseekV3Attention",
    "DeepseekV3Router",
    "DeepseekV3DenseMLP",
    "NeuronDeepseekV3DecoderLayer",
    "NeuronDeepseekV3Model",
    "NeuronDeepseekV3ForCausalLM",
]

# The released code does not pass rms_norm_eps to the two latent norms, so they keep 1e-6 whatever config.json says
# (Moonlight: 1e-5). So does Hugging Face.
LATENT_NORM_EPS = 1e-6


def _row_parallel(config: DeepseekV3InferenceConfig, input_size: int, bias: bool) -> nn.Module:
    """The linear layer back to hidden_size. The ranks' outputs are summed; with sequence parallelism each rank keeps
    its own tokens."""
    neuron_config = config.neuron_config
    return backend.RowParallelLinear(
        input_size,
        config.model.hidden_size,
        bias=bias,
        input_is_parallel=True,
        dtype=neuron_config.torch_dtype,
        reduce_dtype=neuron_config.rpl_reduce_dtype,
        sequence_parallel_enabled=neuron_config.sequence_parallel_enabled,
        sequence_dimension=1,
    )


class DeepseekV3Attention(nn.Module):
    """Multi-head latent attention: expanded for prompts, absorbed over the latent cache for decoding.

    The down-projections of queries and keys are one matrix, split over the ranks by rows; a small gather of the latents
    follows. Heads are split over the ranks, as many on each: those that the model lacks have zeros for weights, so that
    their scores are 0 and their values too.
    """

    def __init__(self, config: DeepseekV3InferenceConfig):
        super().__init__()
        model, neuron_config = config.model, config.neuron_config
        self.q_lora_rank, self.kv_lora_rank = model.q_lora_rank, model.kv_lora_rank
        self.nope_dim, self.rope_dim, self.v_dim = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        heads, dtype = model.padded_heads(neuron_config.tp_degree), neuron_config.torch_dtype
        self.num_heads = heads // neuron_config.tp_degree
        self.softmax_scale = model.softmax_scale
        rope = model.rope_scaling
        self.query_growth = (rope.llama_4_scaling_beta, rope.original_max_position_embeddings) if rope else (None, 0)
        self.sequence_parallel = neuron_config.sequence_parallel_enabled
        shards = neuron_config.kv_seq_shards
        self.shard_group = backend.shard_group(shards) if shards > 1 else None

        column = {"bias": False, "gather_output": False, "dtype": dtype}
        norm = backend.rmsnorm_cls()
        self.qkv_a_proj = backend.ColumnParallelLinear(
            model.hidden_size, model.latent_size, bias=model.attention_bias, gather_output=False, dtype=dtype
        )
        q_size = heads * (self.nope_dim + self.rope_dim)
        if self.q_lora_rank is None:
            self.q_proj = backend.ColumnParallelLinear(model.hidden_size, q_size, **column)
        else:
            self.q_a_layernorm = norm(self.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = backend.ColumnParallelLinear(self.q_lora_rank, q_size, **column)
        self.kv_a_layernorm = norm(self.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = backend.ColumnParallelLinear(self.kv_lora_rank, heads * (self.nope_dim + self.v_dim), **column)
        self.o_proj = _row_parallel(config, heads * self.v_dim, bias=model.attention_bias)
        self.rotary_emb = DeepseekV3RotaryEmbedding(self.rope_dim, model.rope_theta, model.rope_scaling)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_value: KeyValue | None = None,
        active_mask: Tensor | None = None,
        cos_cache: Tensor | None = None,
        sin_cache: Tensor | None = None,
        is_for_context_encoding: bool = False,
        shard_rank: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue, Tensor, Tensor]:
        """hidden_states [B, S, H], position_ids [B, S]. With sequence parallelism, the hidden states of a prompt are
        this rank's tokens, [B, S/TP, H], and so is the output.

        Prompt without a cached prefix (past_key_value None): causal, attention_mask is not read. Prompt behind one
        (is_for_context_encoding): (k_pe [B, 1, L, P], latent [B, 1, L, R]) of the prefix, attention_mask [B, L] over
        it. Decoding: the same of the cache, attention_mask bool [B, 1, S, L] over it, active_mask [B, 1, S, S] among
        the new tokens (None for one). With kv_seq_shards, the cache and a step's mask are of this rank's rows, and
        shard_rank, int [1], is its number in its group. Returns the output, the new tokens' (k_pe, latent), and cos,
        sin for the next layer.
        """
        if cos_cache is None:
            cos_cache, sin_cache = self.rotary_emb(position_ids)
        is_prompt = is_for_context_encoding or past_key_value is None
        if self.sequence_parallel and is_prompt:
            hidden_states = backend.gather_sequence(hidden_states)
        q_nope, q_pe, k_pe, latent = self._project(hidden_states, cos_cache, sin_cache)
        if self.query_growth[0] is not None:
            growth = query_growth(position_ids, *self.query_growth).to(q_nope.dtype)
            q_nope, q_pe = q_nope * growth, q_pe * growth
        active = (k_pe, latent)
        if past_key_value is None:
            out_BNSV = self._prefill(q_nope, q_pe, active)
        elif is_prompt:
            out_BNSV = self._continue(q_nope, q_pe, past_key_value, active, attention_mask)
        else:
            out_BNSV = self._decode(q_nope, q_pe, past_key_value, active, attention_mask, active_mask, shard_rank)
        output = self.o_proj(out_BNSV.transpose(1, 2).flatten(2))
        return output, active, cos_cache, sin_cache

    def _project(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope [B, N, S, D], q_pe [B, N, S, P], k_pe [B, 1, S, P], latent [B, 1, S, R]; q_pe and k_pe rotated."""
        q_rank = self.q_lora_rank or 0
        ends = (q_rank, q_rank + self.kv_lora_rank)
        q_latent, latent, k_pe = self._gathered(self.qkv_a_proj(hidden_states)).tensor_split(ends, -1)
        q = self.q_proj(hidden_states) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(q_latent))
        q_BNSd = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_nope, q_pe = q_BNSd.tensor_split((self.nope_dim,), -1)
        latent = self.kv_a_layernorm(latent).unsqueeze(1)
        return q_nope, rotate_interleaved(q_pe, cos, sin), rotate_interleaved(k_pe.unsqueeze(1), cos, sin), latent

    @staticmethod
    def _gathered(part: Tensor) -> Tensor:
        """All ranks' columns, from this rank's. Neuron's collectives want a multiple of 4 bytes from each rank, which
        33 BF16 values (a token of the released model at TP 64) are not: those travel as float32."""
        padded = part.to(torch.float32) if part.numel() * part.element_size() % 4 else part
        return backend.gather_columns(padded).to(part.dtype)

    def _prefill(self, q_nope: Tensor, q_pe: Tensor, keys: KeyValue, prefix_mask: Tensor | None = None) -> Tensor:
        k_pe, latent = keys
        kv_BNSd = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, v = kv_BNSd.tensor_split((self.nope_dim,), -1)
        return expanded_attention(q_nope, q_pe, k_nope, k_pe, v, self.softmax_scale, prefix_mask)

    def _continue(self, q_nope: Tensor, q_pe: Tensor, prefix: KeyValue, active: KeyValue, mask: Tensor) -> Tensor:
        """A prompt's tokens behind its cached prefix; mask [B, L] over that."""
        length = q_nope.shape[2]
        if self.shard_group:
            prefix, mask = gathered_rows(prefix, self.shard_group), by_rank(mask, self.shard_group.size)
        prefix_mask = mask[:, None, None, :].to(torch.bool)
        if expands_prefix(length, self.nope_dim, self.v_dim, self.kv_lora_rank):
            k_pe, latent = (torch.cat(pair, dim=2) for pair in zip(prefix, active, strict=True))
            return self._prefill(q_nope, q_pe, (k_pe, latent), prefix_mask)
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        return self._decode(q_nope, q_pe, prefix, active, prefix_mask, causal)

    def _decode(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        cached: KeyValue,
        active: KeyValue,
        mask: Tensor,
        active_mask: Tensor | None,
        shard_rank: Tensor | None = None,
    ) -> Tensor:
        """Over this rank's part of the cache where there is a shard_rank, else over all of it."""
        w_kv_NdR = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        w_uk, w_uv = w_kv_NdR.tensor_split((self.nope_dim,), 1)
        arguments = (q_nope, q_pe, w_uk, w_uv, cached, active, mask, active_mask, self.softmax_scale)
        if shard_rank is None:
            return absorbed_attention(*arguments)
        return sharded_attention(*arguments, self.shard_group, shard_rank)


class DeepseekV3DenseMLP(nn.Module):
    """SwiGLU of the first layers, split over the ranks along its intermediate axis."""

    def __init__(self, config: DeepseekV3InferenceConfig):
        super().__init__()
        model, neuron_config = config.model, config.neuron_config
        hidden, intermediate = model.hidden_size, model.intermediate_size
        column = {"bias": False, "gather_output": False, "dtype": neuron_config.torch_dtype}
        self.gate_proj = backend.ColumnParallelLinear(hidden, intermediate, **column)
        self.up_proj = backend.ColumnParallelLinear(hidden, intermediate, **column)
        self.down_proj = _row_parallel(config, intermediate, bias=False)
        self.sequence_parallel = neuron_config.sequence_parallel_enabled

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.sequence_parallel:
            hidden_states = backend.gather_sequence(hidden_states)
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class NeuronDeepseekV3DecoderLayer(nn.Module):
    """Attention and dense MLP or experts, each behind a norm and with a residual connection."""

    def __init__(self, config: DeepseekV3InferenceConfig, layer_idx: int):
        super().__init__()
        model, norm = config.model, backend.rmsnorm_cls()
        self.input_layernorm = norm(model.hidden_size, eps=model.rms_norm_eps)
        self.self_attn = DeepseekV3Attention(config)
        self.post_attention_layernorm = norm(model.hidden_size, eps=model.rms_norm_eps)
        self.is_moe = model.has_experts(layer_idx)
        self.mlp = backend.build_moe(config, DeepseekV3Router(config)) if self.is_moe else DeepseekV3DenseMLP(config)
        if model.has_norm_after_mlp(layer_idx):
            self.post_mlp_layernorm = norm(model.hidden_size, eps=model.rms_norm_eps)
        else:
            self.post_mlp_layernorm = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_value: KeyValue | None = None,
        active_mask: Tensor | None = None,
        cos_cache: Tensor | None = None,
        sin_cache: Tensor | None = None,
        padding_mask: Tensor | None = None,
        is_for_context_encoding: bool = False,
        shard_rank: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, KeyValue, Tensor, Tensor, None]:
        """As DeepseekV3Attention.forward, for the whole layer. The fifth result is NxDI's fused residual: not used."""
        attention, key_value, cos_cache, sin_cache = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            position_ids,
            past_key_value,
            active_mask,
            cos_cache,
            sin_cache,
            is_for_context_encoding,
            shard_rank,
        )
        hidden_states = hidden_states + attention
        normed = self.post_attention_layernorm(hidden_states)
        mlp_output = self.mlp(normed, padding_mask)[0] if self.is_moe else self.mlp(normed)
        if self.post_mlp_layernorm is not None:
            mlp_output = self.post_mlp_layernorm(mlp_output)
        return hidden_states + mlp_output, key_value, cos_cache, sin_cache, None


class DeepseekV3MTPLayer(NeuronDeepseekV3DecoderLayer):
    """The decoder layer of the draft, with the norm ahead of its head: NxDI's base model has no norm for drafts."""

    def __init__(self, config: DeepseekV3InferenceConfig):
        super().__init__(config, config.model.num_hidden_layers)
        self.shared_head_norm = backend.rmsnorm_cls()(config.model.hidden_size, eps=config.model.rms_norm_eps)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, KeyValue, Tensor, Tensor, None]:
        hidden_states, *rest = super().forward(*args, **kwargs)
        return self.shared_head_norm(hidden_states), *rest


class NeuronDeepseekV3Model(backend.NeuronBaseModel):
    """Embedding, decoder layers, final norm and head, over the latent cache. With `is_eagle_draft` in the NeuronConfig
    it is the draft: the MTP layer between embedding and head (mtp.py)."""

    def setup_attr_for_model(self, config: DeepseekV3InferenceConfig) -> None:
        neuron_config = config.neuron_config
        self.on_device_sampling = neuron_config.on_device_sampling_config is not None
        self.tp_degree = neuron_config.tp_degree
        self.hidden_size = config.model.hidden_size
        self.num_attention_heads = config.model.num_attention_heads
        self.num_key_value_heads = 1  # the latent
        self.max_batch_size = neuron_config.max_batch_size
        self.buckets = getattr(neuron_config, "buckets", None)

    def init_model(self, config: DeepseekV3InferenceConfig) -> None:
        model, dtype = config.model, config.neuron_config.torch_dtype
        hidden, vocab = model.hidden_size, model.vocab_size
        self.embed_tokens = backend.ParallelEmbedding(
            vocab, hidden, model.pad_token_id, dtype=dtype, shard_across_embedding=True
        )
        if config.neuron_config.is_eagle_draft:
            self.fc, layers = MTPInput(config), [DeepseekV3MTPLayer(config)]
        else:
            layers = [NeuronDeepseekV3DecoderLayer(config, layer) for layer in range(model.num_hidden_layers)]
            self.norm = backend.rmsnorm_cls()(hidden, eps=model.rms_norm_eps)
        self.layers = nn.ModuleList(layers)
        self.lm_head = backend.ColumnParallelLinear(
            hidden, vocab, bias=False, gather_output=not self.on_device_sampling, dtype=dtype
        )

    def init_inference_optimization(self, config: DeepseekV3InferenceConfig) -> None:
        super().init_inference_optimization(config)
        self.is_paged = config.neuron_config.is_block_kv_layout
        self.kv_seq_shards = config.neuron_config.kv_seq_shards
        cached = copy.copy(config)
        cached.num_hidden_layers = len(self.layers)
        self.kv_mgr = latent_cache_manager(config.neuron_config)(cached, num_kv_head=self.num_key_value_heads)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NeuronDeepseekV3Model":
        """Moves and casts like any module, but leaves FP8 weights and their scales what they are: NxDI casts both to
        bfloat16."""
        kept = {
            id(tensor) for name, tensor in self.named_parameters() if name.endswith(".scale") or tensor.itemsize == 1
        }

        def keep_fp8(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_fp8, recurse)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *args: Any, **kw: Any) -> Any:
        """As the base model's, with padding at position -1 in prompts.

        NxDI gives padding position 1 and reads the logits at the largest position. For a one-token prompt that would be
        the padding, so it gets -1 here. With a paged cache, attention_mask is of the cached prefix alone.
        """
        if self._is_context_encoding(input_ids):
            is_token = (
                self._behind_prefix(position_ids, *args[10:12]) if self.is_paged else attention_mask.to(torch.bool)
            )
            position_ids = torch.where(is_token, position_ids, -1)
        return super().forward(input_ids, attention_mask, position_ids, *args, **kw)

    @staticmethod
    def _behind_prefix(position_ids: Tensor, num_queries: Tensor, computed_context_lens: Tensor) -> Tensor:
        """Which of a prompt's padded tokens [B, S] are tokens. The first may be a cached one, computed again to fill
        its bucket; num_queries and computed_context_lens [B, 1] count without those."""
        count = num_queries + computed_context_lens - position_ids[:, :1]
        return torch.arange(position_ids.shape[1], device=position_ids.device) < count

    def _create_context_attn_mask(self, attention_mask: Tensor, **_: Any) -> Tensor:
        """Of the cached prefix, if there is one; NxDI's own has the square of the prompt's length."""
        return attention_mask

    def get_model_output(self, *, attention_mask: Tensor | None = None, **kw: Any) -> Any:
        """As the base model's. A decoding step has its mask over what it reads of the cache."""
        if self.kv_seq_shards > 1:
            kw["shard_rank"] = torch.remainder(backend.rank_of(self), self.kv_seq_shards)
        if not kw["is_for_context_encoding"]:
            attention_mask = self._step_mask(attention_mask, kw.get("active_block_table"), kw.get("shard_rank"))
        return super().get_model_output(attention_mask=attention_mask, **kw)

    def _step_mask(self, mask: Tensor, tables: Tensor | None, shard_rank: Tensor | None) -> Tensor:
        """The mask [B, 1, S, L] over the cached positions as one over the keys that this rank reads: of its own rows,
        or of the whole pool of blocks."""
        lengths = mask[:, 0, 0].sum(-1)
        if shard_rank is not None:
            lengths = held_rows(lengths, self.kv_seq_shards, shard_rank)
            rows = torch.arange(rows_of(mask.shape[-1], self.kv_seq_shards), device=mask.device)
            mask = (rows < lengths[:, None])[:, None, None, :]
        if self.is_paged and self.kv_mgr.attends_pool(tables):
            mask = self.kv_mgr.pool_mask(tables, lengths)
        return mask


def __getattr__(name: str) -> Any:
    """The causal LM, which builds on this file."""
    if name == "NeuronDeepseekV3ForCausalLM":
        from .application import NeuronDeepseekV3ForCausalLM

        return NeuronDeepseekV3ForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
