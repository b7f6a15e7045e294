"""RoPE and YaRN against transformers, and the rotation against complex multiplication."""

import math

import pytest
import torch
from nxdi_deepseek.model_config import read_model_config
from nxdi_deepseek.rope_util import DeepseekV3RotaryEmbedding, YarnScaling, inverse_frequencies, rotate_interleaved
from support.models import V3
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding as HuggingFaceRotary

SCALINGS = {
    "released": {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},
    "Kimi-K2": {"factor": 32, "original_max_position_embeddings": 4096, "beta_fast": 1, "beta_slow": 1},
    "short original context": {"factor": 4, "original_max_position_embeddings": 100, "beta_fast": 7, "beta_slow": 3},
    "factor 1": {"factor": 1, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},
}
MSCALES = [(1.0, 1.0), (1.3, 0.707)]


@pytest.mark.parametrize("mscale, mscale_all_dim", MSCALES)
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dim, theta", [(64, 10000.0), (24, 50000.0)])
def test_cos_and_sin_equal_hugging_face(name, dim, theta, mscale, mscale_all_dim):
    fields = SCALINGS[name] | {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    config = DeepseekV3Config(
        qk_rope_head_dim=dim, rope_theta=theta, rope_scaling={"type": "yarn", "rope_type": "yarn"} | fields
    )
    positions = torch.tensor([[0, 1, 2, 77], [5, 4096, 40000, 163839]])
    cos, sin = DeepseekV3RotaryEmbedding(dim, theta, YarnScaling(**fields))(positions)
    expected_cos, expected_sin = HuggingFaceRotary(config)(torch.zeros(1), positions)
    # Two float32 formulas for one frequency differ by a few units in the last place; the angle multiplies that.
    tolerance = 4 * torch.finfo(torch.float32).eps * positions.max().item()
    half = dim // 2
    torch.testing.assert_close(cos[:, 0], expected_cos[..., :half], rtol=0, atol=tolerance)
    torch.testing.assert_close(sin[:, 0], expected_sin[..., :half], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        inverse_frequencies(dim, theta, YarnScaling(**fields)), HuggingFaceRotary(config).inv_freq
    )


def test_without_scaling_pair_i_turns_by_theta_to_the_minus_2i_over_dim():
    expected = [10000.0 ** (-2 * i / 16) for i in range(8)]
    torch.testing.assert_close(inverse_frequencies(16, 10000.0), torch.tensor(expected))


def test_without_either_mscale_cos_is_scaled_but_not_the_softmax():
    fields = {name: value for name, value in V3["rope_scaling"].items() if "mscale" not in name}
    scaling = read_model_config(V3 | {"rope_scaling": fields}).rope_scaling
    expected = HuggingFaceRotary(DeepseekV3Config(rope_scaling=fields | {"rope_type": "yarn"}))
    assert scaling.attention_factor == pytest.approx(expected.attention_scaling)
    assert scaling.softmax_factor == 1.0


def test_softmax_scale_of_the_released_config():
    fields = V3 | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    expected = (128 + 64) ** -0.5 * (0.1 * math.log(40) + 1) ** 2
    assert read_model_config(fields).softmax_scale == pytest.approx(expected)


@pytest.mark.parametrize("rope_scaling", [None, {}, {"rope_type": "default"}])
def test_no_scaling(rope_scaling):
    config = read_model_config(V3 | {"rope_scaling": rope_scaling})
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


def test_rope_parameters_of_transformers_5_are_read():
    fields = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")}
    parameters = SCALINGS["Kimi-K2"] | {"rope_type": "yarn", "rope_theta": 50000.0}
    config = read_model_config(fields | {"rope_parameters": parameters})
    assert config.rope_theta == 50000.0
    assert config.rope_scaling == YarnScaling(**SCALINGS["Kimi-K2"])


@pytest.mark.parametrize("seed", [0, 1])
def test_rotation_is_complex_multiplication_with_each_rows_own_positions(seed):
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(seed))
    positions = torch.tensor([[0, 1, 2, 3, 4], [10, 7, 8, 300, 2]])
    cos, sin = DeepseekV3RotaryEmbedding(16, 10000.0)(positions)
    turn = torch.polar(torch.ones(2, 1, 5, 8), positions[:, None, :, None] * inverse_frequencies(16, 10000.0))
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(rotate_interleaved(x, cos, sin), expected)
