"""Expert selection as pure tensor functions (DeepSeek-V3, arXiv:2412.19437, sections 2.1.2 and 4.2; `noaux_tc`).

Shape suffixes: T tokens, E routed experts, G groups, K experts per token. Everything here is float32: two experts whose
scores differ by less than a bfloat16 step are common, and picking the wrong one changes the output.
"""

import torch
from torch import Tensor

# How logits become affinities, and how a group is rated by its experts' biased scores [T, G, E/G]; see family.Member.
SCORING = {"sigmoid": torch.sigmoid, "softmax": lambda logits_TE: logits_TE.softmax(dim=-1)}
GROUP_RATING = {
    "two best": lambda choice_TGe: choice_TGe.topk(2, dim=-1).values.sum(dim=-1),
    "maximum": lambda choice_TGe: choice_TGe.amax(dim=-1),
}


def select_experts(
    scores_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    grouping: str | None = "two best",
) -> Tensor:
    """Indices int64 [T, K] of the experts that each token uses, best first.

    scores_TE: float32 affinities. bias_E: float32 load-balancing correction, None where a model has none; it changes
    which experts are chosen, not their weights.
    The experts form `n_group` groups of neighbours; a group is rated by its biased scores as `grouping` says, and only
    the best `topk_group` groups may give experts. Experts of other groups get -inf, not 0: an expert of a chosen group
    must win even with a negative score.
    """
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if n_group > 1:
        choice_TGe = choice_TE.unflatten(-1, (n_group, -1))
        group_scores_TG = GROUP_RATING[grouping](choice_TGe)
        chosen_TG = _marked(group_scores_TG.topk(topk_group, dim=-1).indices, n_group)
        choice_TE = choice_TGe.masked_fill(chosen_TG.eq(0).unsqueeze(-1), float("-inf")).flatten(-2)
    return choice_TE.topk(top_k, dim=-1).indices


def _marked(index_TK: Tensor, size: int) -> Tensor:
    """1 at the K positions of each row, 0 elsewhere, float32 [T, size].

    By comparing and adding, as NxD marks a token's experts: no graph known to run on Neuron scatters booleans.
    """
    positions = torch.arange(size, device=index_TK.device)
    return sum((column.unsqueeze(-1) == positions).to(torch.float32) for column in index_TK.unbind(-1))


def expert_weights(scores_TE: Tensor, expert_index_TK: Tensor, normalize: bool, scaling_factor: float) -> Tensor:
    """Mixing weights, float32 [T, K]: the unbiased scores of the chosen experts.

    normalize: divide by their sum (`norm_topk_prob`). scaling_factor: `routed_scaling_factor`.
    """
    weights_TK = scores_TE.gather(-1, expert_index_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * scaling_factor


def spread(weights_TK: Tensor, expert_index_TK: Tensor, num_experts: int) -> Tensor:
    """The weights [T, K] in the columns of their experts, [T, E], zero elsewhere."""
    zeros_TE = weights_TK.new_zeros(len(weights_TK), num_experts)
    return zeros_TE.scatter(-1, expert_index_TK, weights_TK)


def packed(weights_TK: Tensor, expert_index_TK: Tensor) -> Tensor:
    """Both in one float32 tensor [T, 2K], for one collective: the number of an expert is exact in float32."""
    return torch.cat((weights_TK, expert_index_TK.to(torch.float32)), dim=-1)


def unpacked(choice_TK2: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `packed`: float32 [T, K], int64 [T, K]."""
    weights_TK, index_TK = choice_TK2.tensor_split(2, dim=-1)
    return weights_TK, index_TK.to(torch.int64)
