"""The table of weight forms: shapes at the released sizes, and blocks that lie within the checkpoint's own."""

import pytest
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import RELEASED_CONFIG
from nxdi_deepseek.model_config import read_model_config
from nxdi_deepseek.weight_forms import DOWN, FORMS, FP8, FP8_BLOCK, GATE_UP, form_of_quantization_type, weight_form

RELEASED = read_model_config(RELEASED_CONFIG)


@pytest.mark.parametrize("tp_degree, block", [(64, (128, 32)), (32, (128, 64)), (16, (128, 128)), (4, (128, 128))])
def test_blocks_at_the_released_sizes(tp_degree, block):
    assert FP8_BLOCK.neuron_fields(RELEASED, tp_degree) == {
        "quantized": True,
        "quantization_type": "blockwise_symmetric",
        "quantization_dtype": "f8e4m3",
        "quantization_block_axis": [1, 2],
        "quantization_block_size": list(block),
    }


def test_scales_of_a_rank_at_the_released_sizes():
    shapes = {
        form.name: [form.scale(name, RELEASED, 64).rank_shape(64) for name in (GATE_UP, DOWN)]
        for form in (FP8, FP8_BLOCK)
    }
    assert shapes == {"fp8": [(256, 1, 64), (256, 1, 7168)], "fp8-block": [(256, 56, 2), (256, 1, 224)]}


@pytest.mark.parametrize(
    "hidden, width, tp_degree, stored", [(192, 144, 2, 128), (7168, 1536, 64, 128), (64, 48, 4, 32)]
)
def test_every_block_lies_in_one_of_the_checkpoint(hidden, width, tp_degree, stored):
    fields = RELEASED_CONFIG | {"hidden_size": hidden, "moe_intermediate_size": width}
    config = read_model_config(
        fields | {"quantization_config": {"weight_block_size": [stored, stored]}, "kv_lora_rank": 512}
    )
    gate_up, down = (FP8_BLOCK.scale(name, config, tp_degree).rank_shape(tp_degree) for name in (GATE_UP, DOWN))
    own = width // tp_degree
    for start, extent, count in (
        (0, hidden, gate_up[1]),
        (0, hidden, down[2]),
        *((rank * own, own, count) for rank in range(tp_degree) for count in (gate_up[2] // 2, down[1])),
    ):
        size = extent // count
        assert size * count == extent
        for block in range(start, start + extent, size):
            assert block // stored == (block + size - 1) // stored


def test_blocks_that_save_nothing_are_refused():
    config = read_model_config(RELEASED_CONFIG | {"moe_intermediate_size": 64})
    with pytest.raises(ConfigError, match="leave blocks of 1x1; use weights fp8 or another tp_degree"):
        read = RELEASED_CONFIG | {"moe_intermediate_size": 64, "hidden_size": 7168 + 64}
        FP8_BLOCK.check(read_model_config(read | {"quantization_config": {"weight_block_size": [1, 1]}}), 64)
    FP8.check(config, 64)


def test_names():
    assert [weight_form(name).name for name in FORMS] == ["bf16", "fp8", "fp8-block"]
    assert form_of_quantization_type("blockwise_symmetric") is FP8_BLOCK
    with pytest.raises(ConfigError, match="weights 'int8' is not supported; use bf16, fp8, fp8-block"):
        weight_form("int8")
    with pytest.raises(ConfigError, match="quantization_type 'per_tensor_symmetric' is not supported; use expert_wise"):
        form_of_quantization_type("per_tensor_symmetric")
