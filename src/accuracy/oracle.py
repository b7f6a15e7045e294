"""The oracle: Hugging Face's own DeepSeek-V3 modules, one layer and one expert in memory at a time.

What is Hugging Face's: norms, attention with its rotary embedding, router, dense MLP, each expert and the shared
experts. What is not: the residual additions and the weighted sum over experts, which are spread over many modules there
and need only a part of the weights at a time here. Equality with the whole model is tested.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.folder import Checkpoint
from ..routing import SCORING
from .reference import Weights, hugging_face_config, judge_class
from .tracing import attention_taps, interleave, put

# Rows of the head in memory at a time: 8192 x 7168 in float32 are 235 MB.
_HEAD_ROWS = 8192


class KeyValues:
    """The cache of one sequence in one layer, in the form that Hugging Face's attention hands over: expanded per head
    in transformers 4 ([1, N, L, D+P], [1, N, L, V]), compressed in transformers 5 ([1, 1, L, R], [1, 1, L, P])."""

    def __init__(self, tensors: tuple[Tensor, Tensor] | None = None):
        self.tensors = tensors

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions. Raises ValueError where there are fewer."""
        if self.tensors is not None:
            if self.tensors[0].shape[2] < length:
                raise ValueError(f"{self.tensors[0].shape[2]} positions of {length}")
            self.tensors = tuple(tensor[:, :, :length] for tensor in self.tensors)

    def update(self, first: Tensor, second: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hugging Face's Cache.update: appends and returns all."""
        new = (first, second)
        if self.tensors is not None:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(self.tensors, new, strict=True))
        self.tensors = new
        return new

    def rotary_keys(self, rope_dim: int, compressed: bool, in_halves: bool) -> Tensor:
        """The rotated k_pe [L, P], pairs interleaved as DeepSeek's."""
        keys = (self.tensors[1] if compressed else self.tensors[0])[0, 0, :, -rope_dim:]
        return interleave(keys) if in_halves else keys


class LayerOracle:
    """Runs a checkpoint layer by layer on hidden states [S, H] of several sequences in `dtype`.

    Reads weights from an open checkpoint. Raises CheckpointError for one that is not sound.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        self.checkpoint, self.config, self.dtype = checkpoint, checkpoint.config, dtype
        self.hf_config = hugging_face_config(checkpoint)
        self.weights = Weights(checkpoint, dtype)
        self.rotary = judge_class(self.config, "RotaryEmbedding")(self.hf_config)
        attention = judge_class(self.config, "Attention")
        # transformers 5 caches the latent, transformers 4 the keys and values of all heads
        self._compressed = hasattr(attention, "expand_kv")
        # as it has come to be called in the course of transformers 5
        self._cache_argument = "cache" if "cache" in signature(attention.forward).parameters else "past_key_values"

    @property
    def cache_width(self) -> int:
        """Numbers that a layer's cache holds for each position."""
        config = self.config
        if self._compressed:
            return config.kv_lora_rank + config.qk_rope_head_dim
        head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return config.num_attention_heads * head

    @torch.no_grad()
    def embed(self, token_ids: list[int]) -> Tensor:
        """[S, H]. Reads the rows of these tokens only."""
        rows = {token: self.weights.rows("model.embed_tokens.weight", token, token + 1)[0] for token in set(token_ids)}
        return torch.stack([rows[token] for token in token_ids])

    @torch.no_grad()
    def run_layer(
        self,
        layer: int,
        hidden_states: dict[int, Tensor],
        caches: dict[int, KeyValues],
        trace: dict[str, Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """The layer's output for each sequence. hidden_states: [S, H] of new tokens by sequence; caches: what the layer
        saw of the same sequences before, extended in place. trace takes `SEQUENCE.POINT` (see trace.py)."""
        prefix = f"model.layers.{layer}."
        hidden_states = self._attend(prefix, hidden_states, caches, trace)
        norm = self._norm(prefix + "post_attention_layernorm.")
        normed = {i: norm(h) for i, h in hidden_states.items()}
        put(trace, "post_attention_layernorm", normed)
        mlp_output = (self._moe if self.config.has_experts(layer) else self._dense)(prefix + "mlp.", normed, trace)
        put(trace, "mlp", mlp_output)
        if self.config.has_norm_after_mlp(layer):
            norm = self._norm(prefix + "post_mlp_layernorm.")
            mlp_output = {i: norm(h) for i, h in mlp_output.items()}
            put(trace, "post_mlp_layernorm", mlp_output)
        output = {i: h + mlp_output[i] for i, h in hidden_states.items()}
        put(trace, "output", output)
        return output

    @torch.no_grad()
    def final_norm(self, hidden_states: Tensor) -> Tensor:
        return self._norm("model.norm.")(hidden_states)

    @torch.no_grad()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """float32 [S, vocab] from the last layer's output [S, H]; the head goes by in pieces."""
        normed = self.final_norm(hidden_states)
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        vocab = self.config.vocab_size
        pieces = (
            F.linear(normed, self.weights.rows(name, start, min(start + _HEAD_ROWS, vocab)))
            for start in range(0, vocab, _HEAD_ROWS)
        )
        return torch.cat([piece.to(torch.float32) for piece in pieces], dim=-1)

    def _norm(self, prefix: str) -> nn.Module:
        return self._load("RMSNorm", prefix, self.config.hidden_size, self.config.rms_norm_eps)

    def _attend(
        self, prefix: str, hidden_states: dict[int, Tensor], caches: dict[int, KeyValues], trace: dict | None
    ) -> dict[int, Tensor]:
        norm = self._norm(prefix + "input_layernorm.")
        attention = self._load("Attention", prefix + "self_attn.", self.hf_config, 0)
        output = {}
        for i, h in hidden_states.items():
            length = caches[i].tensors[0].shape[2] if caches[i].tensors else 0
            positions = torch.arange(length, length + len(h))[None]
            normed = norm(h)
            put(trace, "input_layernorm", {i: normed})
            with attention_taps(attention, lambda point, value, i=i: put(trace, point, {i: value[0]})):
                rotary = self.rotary(h[None], positions)
                attended, _ = attention(
                    hidden_states=normed[None],
                    position_embeddings=rotary,
                    position_ids=positions,
                    attention_mask=_causal_mask(length, len(h), self.dtype),
                    **{self._cache_argument: caches[i]},
                )
            # Where the angles are complex numbers, as DeepSeek-V2's, pairs stay neighbours.
            in_halves = isinstance(rotary, tuple)
            k_pe = caches[i].rotary_keys(self.config.qk_rope_head_dim, self._compressed, in_halves)
            put(trace, "self_attn.k_pe", {i: k_pe[length:]})
            output[i] = h + attended[0]
        return output

    def _dense(self, prefix: str, normed: dict[int, Tensor], trace: dict | None) -> dict[int, Tensor]:
        mlp = self._load("MLP", prefix, self.hf_config)
        return {i: mlp(h) for i, h in normed.items()}

    def _moe(self, prefix: str, normed: dict[int, Tensor], trace: dict | None) -> dict[int, Tensor]:
        """All sequences at once, so that each expert is read once."""
        lengths = [len(h) for h in normed.values()]
        tokens_TH = torch.cat(list(normed.values()))

        def split(tensor: Tensor) -> dict[int, Tensor]:
            return dict(zip(normed, tensor.split(lengths), strict=True))

        index_TK, weights_TK, scores_TE = self._route(prefix + "gate.", tokens_TH)
        put(trace, "mlp.router.scores", split(scores_TE))
        put(trace, "mlp.router.weights", split(torch.zeros_like(scores_TE).scatter(-1, index_TK, weights_TK)))
        output_TH = self._experts(prefix + "experts.", tokens_TH, index_TK, weights_TK)
        put(trace, "mlp.experts", split(output_TH))
        if self.config.n_shared_experts:
            width = self.config.moe_intermediate_size * self.config.n_shared_experts
            shared = self._mlp(prefix + "shared_experts.", width)(tokens_TH)
            put(trace, "mlp.shared_experts", split(shared))
            output_TH = output_TH + shared
        return split(output_TH)

    def _route(self, prefix: str, tokens_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts [T, K], their weights [T, K], and the biased scores [T, E] that decided, in float32."""
        gate = self._load("TopkRouter", prefix, self.hf_config)
        scores_TE = SCORING[self.config.member.scoring](F.linear(tokens_TH.float(), gate.weight.float()))
        if self.config.member.correction_bias:
            bias = gate.e_score_correction_bias
            scores_TE = scores_TE + bias
            # transformers 4 rules groups out with 0 and so prefers them to negative scores; DeepSeek's release rules
            # them out with -inf. Scores that are all positive mean the same to both, and a shift changes no choice.
            gate.e_score_correction_bias = bias - bias.min().clamp(max=0)
        outputs = gate(tokens_TH[None])[-2:]
        index_TK, weights_TK = sorted(outputs, key=torch.is_floating_point)
        return index_TK, weights_TK.to(torch.float32), scores_TE

    def _experts(self, prefix: str, tokens_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, added up in float32."""
        output_TH = torch.zeros_like(tokens_TH, dtype=torch.float32)
        for expert in index_TK.unique().tolist():
            tokens, slots = torch.where(index_TK == expert)
            mlp = self._mlp(f"{prefix}{expert}.", self.config.moe_intermediate_size)
            output_TH.index_add_(0, tokens, mlp(tokens_TH[tokens]) * weights_TK[tokens, slots, None])
        return output_TH.to(tokens_TH.dtype)

    def _mlp(self, prefix: str, width: int) -> nn.Module:
        return self._load("MLP", prefix, self.hf_config, intermediate_size=width)

    def _load(self, part: str, prefix: str, *args: Any, **options: Any) -> nn.Module:
        """Hugging Face's module for `part` of the model, with its weights."""
        return self.weights.load(lambda: judge_class(self.config, part)(*args, **options), prefix)


def _causal_mask(cached: int, new: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, new, cached + new]."""
    mask = torch.full((new, cached + new), torch.finfo(dtype).min, dtype=dtype)
    return mask.triu(cached + 1)[None, None]
