"""Expert selection and weights against Hugging Face's gate."""

import pytest
import torch
from nxdi_deepseek.modeling_deepseek import DeepseekV3Router
from nxdi_deepseek.routing import expert_weights, packed, select_experts, spread, unpacked
from support.models import V3, make_config
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

ROUTINGS = {
    "released": {"n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8},
    "one group": {"n_routed_experts": 48, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6},
    "not normalised": {"n_routed_experts": 32, "n_group": 4, "topk_group": 1, "norm_topk_prob": False},
    "all groups": {"n_routed_experts": 16, "n_group": 4, "topk_group": 4, "num_experts_per_tok": 3},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ROUTINGS)
def test_router_equals_hugging_face(name, seed):
    fields = V3 | ROUTINGS[name]
    generator = torch.Generator().manual_seed(seed)
    gate = DeepseekV3TopkRouter(DeepseekV3Config(**{k: v for k, v in fields.items() if k != "model_type"}))
    gate.weight.data = torch.randn(gate.weight.shape, generator=generator) / 10
    # From 0 on: below it Hugging Face's gate may pick experts of groups that it ruled out.
    gate.e_score_correction_bias.data = torch.rand(len(gate.weight), generator=generator) / 10
    router = DeepseekV3Router(make_config(fields))
    router.linear_router.weight.data = gate.weight.data
    router.e_score_correction_bias.data = gate.e_score_correction_bias.data

    hidden_states = torch.randn(2, 50, fields["hidden_size"], generator=generator)
    _, weights, chosen = router(hidden_states)
    outputs = gate(hidden_states)[-2:]
    (expected_chosen,) = (t for t in outputs if not t.is_floating_point())
    (expected_weights,) = (t for t in outputs if t.is_floating_point())
    expected = torch.zeros_like(weights).scatter(-1, expected_chosen, expected_weights)
    assert torch.equal(chosen.sort(-1).values, expected_chosen.sort(-1).values)
    torch.testing.assert_close(weights, expected)


def test_ruled_out_groups_lose_even_to_negative_scores():
    """With 0 instead of -inf there, an expert of a ruled-out group would beat the negative one of the chosen group."""
    scores = torch.tensor([[0.9, 0.1, 0.3, 0.2]])
    bias = torch.tensor([0.0, -0.5, -0.25, -0.25])
    assert select_experts(scores, bias, top_k=2, n_group=2, topk_group=1).tolist() == [[0, 1]]


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_groups_of_equal_scores_are_ruled_out_one_by_one(levels):
    """Few distinct scores, so that most groups tie: as many groups stay as are asked for, the ones that topk names."""
    scores = torch.randint(levels, (200, 32), generator=torch.Generator().manual_seed(0)).float() / levels
    chosen = select_experts(scores, torch.zeros(32), top_k=12, n_group=8, topk_group=3)
    groups = scores.unflatten(-1, (8, 4)).topk(2).values.sum(-1).topk(3).indices
    allowed = torch.zeros(200, 8, dtype=torch.bool).scatter(-1, groups, True)
    of_allowed = scores.masked_fill(~allowed.repeat_interleave(4, dim=-1), float("-inf")).topk(12).indices
    assert torch.equal(chosen, of_allowed)  # all 12 experts of 3 groups, in the same order
    assert torch.equal((chosen // 4).sort(-1).values, groups.sort(-1).values.repeat_interleave(4, dim=-1))


def test_bias_selects_but_does_not_weigh():
    scores = torch.tensor([[0.5, 0.4, 0.3, 0.2]])
    bias = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    chosen = select_experts(scores, bias, top_k=2, n_group=1, topk_group=1)
    assert chosen.tolist() == [[3, 1]]
    weights = expert_weights(scores, chosen, normalize=True, scaling_factor=3.0)
    torch.testing.assert_close(spread(weights, chosen, 4), torch.tensor([[0.0, 2.0, 0.0, 1.0]]))


def test_weights_and_experts_survive_one_collective():
    weights = torch.rand(3, 2)
    index = torch.tensor([[0, 4095], [255, 1], [4094, 383]])  # 4,096 experts at most
    for before, after in zip((weights, index), unpacked(packed(weights, index)), strict=True):
        assert after.dtype == before.dtype and torch.equal(after, before)
