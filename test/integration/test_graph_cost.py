"""Rank 0 of the released model, lowered with torch_xla: FLOPs against closed formulas of the config, and upper bounds.

Needs torch_xla beside NxD and NxDI; the README says how to set up such an environment.
"""

import functools
import importlib

import pytest
from nxdi_deepseek.without_sdk import stand_ins
from support import nxdi

nxdi.require_nxdi()
if stand_ins.is_stand_in(importlib.import_module("torch_xla")):
    pytest.skip("torch_xla is not installed", allow_module_level=True)

from nxdi_deepseek.errors import GraphCostError  # noqa: E402
from nxdi_deepseek.example_configs import RELEASED_CONFIG as C  # noqa: E402
from nxdi_deepseek.graph_cost.lowerer import Lowerer  # noqa: E402
from nxdi_deepseek.graph_cost.request import Request  # noqa: E402
from nxdi_deepseek.mla import MAX_QUERY_BLOCKS, QUERY_BLOCK  # noqa: E402

TP = 64
HIDDEN, HEADS = C["hidden_size"], C["num_attention_heads"] // TP
NOPE, ROPE, V = C["qk_nope_head_dim"], C["qk_rope_head_dim"], C["v_head_dim"]
Q_LATENT, LATENT = C["q_lora_rank"], C["kv_lora_rank"]
EXPERTS, TOP_K = C["n_routed_experts"], C["num_experts_per_tok"]
MOE_LAYERS = C["num_hidden_layers"] - C["first_k_dense_replace"]


def projections(tokens):
    down = HIDDEN * (Q_LATENT + LATENT + ROPE) // TP
    return 2 * tokens * (down + Q_LATENT * HEADS * (NOPE + ROPE) + HEADS * V * HIDDEN)


def query_key_pairs(length):
    """Causal, by blocks of queries: each row sees the keys up to the end of its block."""
    rows = max(QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    ends = [min(start + rows, length) for start in range(0, length, rows)]
    return sum((end - start) * end for start, end in zip(range(0, length, rows), ends, strict=True))


def attention(phase, length, batch):
    if phase == "prefill":
        per_head = 2 * length * LATENT * (NOPE + V) + 2 * query_key_pairs(length) * (NOPE + ROPE + V)
        return projections(batch * length) + batch * HEADS * per_head
    per_head = 2 * LATENT * (NOPE + V) + 2 * (length + 1) * (LATENT + ROPE + LATENT)
    return projections(batch) + batch * HEADS * per_head


def mlp(tokens, intermediate):
    return 3 * 2 * tokens * HIDDEN * intermediate // TP


def dense(phase, length, batch):
    tokens = batch * length if phase == "prefill" else batch
    return attention(phase, length, batch) + mlp(tokens, C["intermediate_size"])


def router(phase, tokens):
    """The ranks share out the tokens of a prompt, where they divide them."""
    return 2 * tokens * HIDDEN * EXPERTS // (TP if phase == "prefill" and tokens % TP == 0 else 1)


def moe(phase, length, batch):
    tokens = batch * length if phase == "prefill" else batch
    always = attention(phase, length, batch) + router(phase, tokens) + mlp(tokens, C["moe_intermediate_size"])
    if phase == "decode":
        return always + mlp(tokens * TOP_K, C["moe_intermediate_size"])
    # The experts are a kernel; NxD counts tokens per expert, and blocks, by multiplying with a triangle of ones.
    return always + 2 * tokens * tokens * EXPERTS + 2 * EXPERTS * EXPERTS


def model(phase, length, batch):
    head = 2 * batch * HIDDEN * C["vocab_size"] // TP  # a prompt's last token alone
    dense_layers = C["first_k_dense_replace"] * dense(phase, length, batch)
    return dense_layers + MOE_LAYERS * moe(phase, length, batch) + head


@pytest.fixture(scope="module")
def lowerer():
    with Lowerer() as lowerer:
        yield lowerer


@pytest.fixture(scope="module")
def cost(lowerer):
    """Costs by (part, phase, length, batch), each lowered once."""
    return functools.cache(lambda *graph: lowerer.cost(Request(*graph, tp_degree=TP, config=C)))


@pytest.mark.parametrize(
    "graph",
    [
        (attention, "prefill", 512, 1),
        (attention, "prefill", 1100, 2),
        (attention, "prefill", 32768, 1),
        (attention, "decode", 512, 1),
        (attention, "decode", 4096, 8),
        (dense, "prefill", 256, 1),
        (dense, "decode", 512, 1),
        (moe, "prefill", 512, 1),
        (moe, "decode", 512, 1),
        (moe, "decode", 4096, 8),
        (model, "prefill", 512, 1),
        (model, "decode", 512, 1),
    ],
    ids=lambda graph: " ".join([graph[0].__name__, *map(str, graph[1:])]),
)
def test_dot_flops_follow_from_the_config(cost, graph):
    formula, *sizes = graph
    counted = cost(formula.__name__, *sizes)
    assert sum(counted.dot_flops.values()) == formula(*sizes)
    assert counted.flop_counter == formula(*sizes)


def test_kernel_flops_follow_from_the_blocks(cost):
    tokens, block_size = 512, 128
    blocks = -(-(tokens * TOP_K - (EXPERTS - 1)) // block_size) + EXPERTS - 1
    rows = blocks * block_size
    assert sum(cost("moe", "prefill", tokens, 1).kernel_flops.values()) == mlp(rows, C["moe_intermediate_size"])


def test_the_router_takes_a_tenth_of_a_layers_matrix_cycles_at_most(cost):
    """In float32 the matrix units take four times as long as in BF16."""
    counted = cost("moe", "prefill", 2048, 1)
    assert counted.dot_flops["F32"] == router("prefill", 2048)
    assert 4 * counted.dot_flops["F32"] <= 0.1 * (4 * counted.dot_flops["F32"] + counted.dot_flops["BF16"])


@pytest.mark.parametrize(
    ("graph", "payload"),
    [
        (("attention", "decode", 512, 1), "f32[2112,1,1]"),
        (("attention", "decode", 4096, 8), "bf16[2112,1,8]"),
        (("attention", "prefill", 512, 1), "bf16[2112,512,1]"),
    ],
)
def test_each_rank_gathers_a_multiple_of_four_bytes(cost, graph, payload):
    """33 latents per token and rank: 66 bytes in BF16 where there is one token."""
    (gather,) = [item for item in cost(*graph).collectives if item.kind == "all-gather"]
    assert gather.payload == payload
    assert gather.payload_bytes % (4 * TP) == 0


def test_attention_reads_each_weight_and_the_cache_once(cost):
    length, batch = 4096, 8
    counted = cost("attention", "decode", length, batch)
    cache = 2 * batch * length * (LATENT + ROPE)
    assert counted.parameter_bytes == counted.parameter_bytes_read
    assert counted.parameters_unread == {}
    small = 2 * batch * HIDDEN * 2 + batch * length + 2**15  # input, output, mask, scalars and new latents
    assert cache + counted.parameter_bytes < counted.min_bytes < cache + counted.parameter_bytes + small


def test_decoding_reads_only_the_experts_chosen(cost):
    experts = 2 * 3 * HIDDEN * C["moe_intermediate_size"] // TP
    one, eight = (cost("moe", "decode", length, batch) for length, batch in ((512, 1), (4096, 8)))
    assert eight.parameter_bytes_read - one.parameter_bytes_read == (8 - 1) * TOP_K * experts


@pytest.mark.parametrize(
    ("graph", "figure", "most"),
    [
        (("attention", "prefill", 512, 1), "flops", 3.6e9),
        (("attention", "prefill", 2048, 1), "flops", 18e9),
        (("attention", "prefill", 8192, 1), "flops", 98e9),
        (("moe", "decode", 512, 1), "min_bytes", 23e6),
        (("moe", "decode", 4096, 8), "min_bytes", 140e6),
        (("moe", "decode", 512, 1), "collective_count", 3),
        (("model", "decode", 512, 1), "min_bytes", 1.45e9),
        (("model", "decode", 512, 1), "kv_bytes_per_token", 70272),
    ],
)
def test_costs_stay_below_their_bounds(cost, graph, figure, most):
    assert getattr(cost(*graph), figure) <= most


READS_A_VALUE = """
from nxdi_deepseek import modeling_deepseek as base

class Attention(base.DeepseekV3Attention):
    def forward(self, hidden_states, *args, **kwargs):
        {read}
        return super().forward(hidden_states, *args, **kwargs)

base.DeepseekV3Attention = Attention

class CausalLM(base.NeuronDeepseekV3ForCausalLM):
    pass
"""


@pytest.mark.parametrize(
    "read", ["if hidden_states.sum() > 0: pass", "hidden_states.max().item()", "hidden_states.nonzero()"]
)
def test_a_model_that_reads_a_value_is_refused(lowerer, tmp_path, read):
    (tmp_path / "modeling_deepseek.py").write_text(READS_A_VALUE.format(read=read))
    request = Request("attention", "decode", 512, 1, config=C, impl=str(tmp_path))
    with pytest.raises(GraphCostError, match="reads a tensor's value"):
        lowerer.cost(request)


def test_a_neuron_config_field_that_nxdi_would_ignore_is_refused(lowerer):
    fields = {"sequence_paralel_enabled": True, "disable_normalize_top_k_affinities": True}
    with pytest.raises(GraphCostError, match="NeuronConfig has no sequence_paralel_enabled; remove it$"):
        lowerer.cost(Request("attention", "decode", 512, 1, config=C, neuron_config=fields))
