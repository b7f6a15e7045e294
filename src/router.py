"""The module that chooses each token's experts, over the pure functions of routing.py.

Shape suffixes: B batch, S query length, H hidden, E routed experts, K experts per token, T = B * S.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backend
from .config import DeepseekV3InferenceConfig
from .routing import SCORING, expert_weights, packed, select_experts, spread, unpacked


class DeepseekV3Router(nn.Module):
    """Group-limited router, in float32 from the logits on.

    A prompt's tokens are shared out among the ranks where they can be: in float32 the matrix units take four times as
    long. With sequence parallelism they come shared out, and NxD gathers what was chosen.
    Has the attributes that NxD's MoE module asks of a router.
    """

    sequence_dimension = 1
    # This rank's part of tokens [T, H], [T/TP, H]; set by backend.build_moe, None where every rank routes all tokens.
    own_tokens: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config: DeepseekV3InferenceConfig):
        super().__init__()
        model, dtype = config.model, config.neuron_config.torch_dtype
        self.sequence_parallel_enabled = config.neuron_config.sequence_parallel_enabled
        self.tp_degree = config.neuron_config.tp_degree
        self.num_experts, self.top_k = model.n_routed_experts, model.num_experts_per_tok
        self.hidden_size = model.hidden_size
        self.scoring, self.grouping = SCORING[model.member.scoring], model.grouping
        self.n_group, self.topk_group = model.n_group, model.topk_group
        self.norm_topk_prob, self.routed_scaling_factor = model.norm_topk_prob, model.routed_scaling_factor
        self.linear_router = nn.Linear(self.hidden_size, self.num_experts, bias=False, dtype=dtype)
        bias = nn.Parameter(torch.zeros(self.num_experts), requires_grad=False)
        self.register_parameter("e_score_correction_bias", bias if model.member.correction_bias else None)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [B, S, H]. Returns float32 logits [T, E], of this rank's tokens alone where they are shared
        out; the final mixing weights [T, E], normalised, scaled and zero for experts not chosen, in the dtype of
        hidden_states; the chosen experts, int64 [T, K]."""
        tokens_TH = hidden_states.flatten(0, -2)
        shared_out = self._shares_out(hidden_states)
        logits_TE, weights_TK, index_TK = self._route(self.own_tokens(tokens_TH) if shared_out else tokens_TH)
        if shared_out:
            choice = backend.gather_sequence(packed(weights_TK, index_TK).unsqueeze(0)).squeeze(0)
            weights_TK, index_TK = unpacked(choice)
        return logits_TE, spread(weights_TK, index_TK, self.num_experts).to(hidden_states.dtype), index_TK

    def _shares_out(self, hidden_states: Tensor) -> bool:
        """Prompts of a multiple of the ranks, two tokens each at least. A step's few tokens are not worth a gather."""
        batch, length, _ = hidden_states.shape
        tokens, ranks = batch * length, self.tp_degree
        is_prompt = length > 1 and not self.sequence_parallel_enabled
        return is_prompt and ranks > 1 and tokens % ranks == 0 and tokens >= 2 * ranks and self.own_tokens is not None

    def _route(self, tokens_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights and indices [T, K] of the chosen experts."""
        logits_TE = F.linear(tokens_TH.to(torch.float32), self.linear_router.weight.to(torch.float32))
        scores_TE = self.scoring(logits_TE)
        index_TK = select_experts(
            scores_TE, self.e_score_correction_bias, self.top_k, self.n_group, self.topk_group, self.grouping
        )
        weights_TK = expert_weights(scores_TE, index_TK, self.norm_topk_prob, self.routed_scaling_factor)
        return logits_TE, weights_TK, index_TK

    def scores_for_choice(self, logits_TE: Tensor) -> Tensor:
        """The scores [T, E] that decide which experts are chosen, where groups leave the choice."""
        scores_TE, bias_E = self.scoring(logits_TE), self.e_score_correction_bias
        return scores_TE if bias_E is None else scores_TE + bias_E

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeepseekV3Router":
        """Moves and casts like any module, but leaves the correction bias in float32: NxDI casts whole models to
        bfloat16, whose step near 1 exceeds the differences between the biased scores."""
        bias = self.e_score_correction_bias

        def keep_bias(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is bias and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_bias, recurse)
