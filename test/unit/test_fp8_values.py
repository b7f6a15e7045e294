"""The embedded runtime's arithmetic on FP8 codes."""

import pytest
import torch
from nxdi_deepseek.embedded.moe import _values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_converted_as_torch_does(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().abs() <= 240]
    assert len(codes) == 2 * 15 * 8
    assert torch.equal(_values(codes, dtype), codes.to(dtype))
