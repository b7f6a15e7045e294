"""Block-scaled FP8: bit for bit float32(weight) * scale, rounded once."""

import pytest
import torch
from nxdi_deepseek.checkpoint.convert import read_weight
from nxdi_deepseek.checkpoint.fp8 import quantize_blocks
from nxdi_deepseek.checkpoint.source import StateDictSource
from nxdi_deepseek.errors import CheckpointError
from nxdi_deepseek.model_config import read_model_config
from support.models import V3

SHAPES = [(256, 384), (576, 200), (1, 300), (130, 5)]
BLOCKS = [(128, 128), (64, 32), (100, 7)]


def random_blocks(shape, block, seed, e8m0):
    """All finite codes, and scales over twenty binades."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    scale_shape = [-(-size // width) for size, width in zip(shape, block, strict=True)]
    exponents = torch.randint(107, 127, scale_shape, generator=generator, dtype=torch.uint8)
    if e8m0:
        return codes.view(torch.float8_e4m3fn), exponents
    return codes.view(torch.float8_e4m3fn), torch.rand(scale_shape, generator=generator) * exponents.double().sub(
        127
    ).exp2().float()


def dequantize_blocks(weight, scale, block=(128, 128), dtype=torch.float32, name="model.norm.weight"):
    """As a checkpoint with these two tensors, and blocks of this size in its config.json, is decoded."""
    config = read_model_config(V3 | {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}})
    return read_weight(StateDictSource({name: weight, f"{name}_scale_inv": scale}), name, config, dtype)


def by_definition(weight, scale, block, dtype):
    rows = torch.arange(weight.shape[0]) // block[0]
    columns = torch.arange(weight.shape[1]) // block[1]
    return (weight.float() * scale[rows][:, columns]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("e8m0", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantization_is_bit_identical_to_its_definition(shape, block, e8m0, dtype):
    weight, scale = random_blocks(shape, block, seed=0, e8m0=e8m0)
    scale_value = (scale.double() - 127).exp2().float() if e8m0 else scale
    expected = by_definition(weight, scale_value, block, dtype)
    for stored in [scale] + ([scale.view(torch.float8_e8m0fnu)] if e8m0 else []):
        actual = dequantize_blocks(weight, stored, block, dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_quantization_error_is_at_most_half_a_code_step(seed):
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(seed))
    codes, scale = quantize_blocks(weight)
    error = (dequantize_blocks(codes, scale) - weight).abs()
    # e4m3 has 3 mantissa bits: half a step is 2^-4 of the value, or 2^-10 of the scale among the subnormals.
    bound = torch.maximum(weight.abs() * 2**-4, scale.max() * 2**-10)
    assert (error <= bound * (1 + 1e-6)).all()


def test_a_block_of_zeros_stays_zero():
    codes, scale = quantize_blocks(torch.zeros(130, 140))
    assert torch.equal(dequantize_blocks(codes, scale), torch.zeros(130, 140))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_code_names_the_tensor(code):
    weight = torch.zeros(130, 4, dtype=torch.uint8)
    weight[129, 3] = code
    with pytest.raises(CheckpointError, match=r"layers\.3\.down_proj\.weight: holds NaN"):
        dequantize_blocks(weight.view(torch.float8_e4m3fn), torch.ones(2, 1), name="model.layers.3.down_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named(value):
    weight = torch.zeros(130, 4).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="x.weight_scale_inv: holds NaN or infinity"):
        dequantize_blocks(weight, torch.tensor([[1.0], [value]]), name="model.x.weight")
