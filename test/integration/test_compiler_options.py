"""Options of the compiler and refusals ahead of it, from the config alone."""

import pytest
from support import nxdi

nxdi.require_nxdi()

from neuronx_distributed_inference.utils.compile_env import get_compile_env_vars  # noqa: E402
from nxdi_deepseek.compiler_options import check_prompts, compiler_options, expert_instructions  # noqa: E402
from nxdi_deepseek.errors import ConfigError  # noqa: E402
from nxdi_deepseek.expert_kernel import expert_kernel_cost  # noqa: E402
from support.models import RELEASED, V3, make_config  # noqa: E402

LIMIT = "--internal-max-instruction-limit"


def released(*buckets, **fields):
    fields = {"tp_degree": 64, "seq_len": buckets[-1], "enable_bucketing": True} | fields
    return make_config(RELEASED, context_encoding_buckets=list(buckets), **fields)


def test_instructions_are_stated_for_each_prompt_graph():
    """58 layers of what the library's own tracing counted without skip_dma_*; with both it is within a hundredth."""
    traced = {512: 58 * 51_129, 2048: 58 * 68_307, 8192: 58 * 137_019}
    kernel = {"use_shard_on_block_dynamic_while": True, "block_sharding_strategy": "PING_PONG", "block_size": 128}
    config = released(*traced, blockwise_matmul_config=kernel)
    assert expert_instructions(config) == traced
    lines = check_prompts(config)
    assert [line.split(":")[0] for line in lines] == ["prompts of 512", "prompts of 2048", "prompts of 8192"]
    assert f"{traced[2048]:,} instructions" in lines[1]
    ours = expert_instructions(released(*traced))
    assert ours == {length: pytest.approx(count, rel=0.01) for length, count in traced.items()}


def test_a_layers_expert_kernel_moves_little_by_default():
    """Of a prompt of 512: 1.45 GB read and 2.01 GB moved if every row and every weight were copied."""
    config = released(512)
    kernel = config.neuron_config.blockwise_matmul_config
    skip = {"skip_token": kernel.skip_dma_token, "skip_weight": kernel.skip_dma_weight}
    cost = expert_kernel_cost(config.model, 512, 64, block_size=kernel.block_size, **skip)
    assert cost.read_bytes + cost.written_bytes < 0.6e9


def test_collectives_carry_no_numeric_token_by_default():
    assert get_compile_env_vars(released(512).neuron_config) == {"DISABLE_NUMERIC_CC_TOKEN": "1"}
    assert not get_compile_env_vars(released(512, disable_numeric_cc_token=False).neuron_config)


def test_the_limit_is_raised_where_a_prompt_needs_it(monkeypatch):
    assert f"{LIMIT}=15000000" in compiler_options(released(512))
    assert LIMIT not in compiler_options(make_config(V3))
    intermediate = {"use_shard_on_intermediate_dynamic_while": True}  # a loop, not unrolled
    assert LIMIT not in compiler_options(released(512, blockwise_matmul_config=intermediate))
    monkeypatch.setenv("NEURON_CC_FLAGS", f"{LIMIT}=20000000")
    assert LIMIT not in compiler_options(released(512))


def test_prompts_beyond_the_limit_are_refused_unless_the_user_raised_it(monkeypatch):
    config = released(512, 32768)
    with pytest.raises(ConfigError, match="prompts of 32768: .* use shorter context_encoding_buckets"):
        check_prompts(config)
    monkeypatch.setenv("NEURON_CC_FLAGS", f"--verbose=35 {LIMIT}=40000000")
    assert len(check_prompts(config)) == 2


def test_prompts_that_the_kernel_cannot_add_up_are_refused():
    with pytest.raises(ConfigError, match="1 prompts of 192 are no multiple of 128 tokens"):
        check_prompts(released(128, 192))
    assert check_prompts(released(192, batch_size=2))


def test_compile_refuses_them_ahead_of_the_compiler(tmp_path):
    from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM

    model = NeuronDeepseekV3ForCausalLM(str(tmp_path), released(192))
    with pytest.raises(ConfigError, match="no multiple of 128"):
        model.compile(str(tmp_path / "compiled"))
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize(("length", "batch"), [(130, 1), (65, 2), (127, 3)])
def test_tokens_that_the_ranks_cannot_share_out_are_refused(length, batch):
    """NxD fails on them while it traces, with an assertion about a tensor."""
    refusal = f"{batch} prompts of {length} are {length * batch} tokens, which tp_degree 4"
    with pytest.raises(ConfigError, match=refusal):
        make_config(V3, tp_degree=4, batch_size=batch, seq_len=length)
    assert make_config(V3, tp_degree=1, batch_size=batch, seq_len=length)
    assert make_config(V3, tp_degree=4, batch_size=batch, seq_len=128, max_context_length=64)
