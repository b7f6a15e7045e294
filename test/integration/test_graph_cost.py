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
from nxdi_deepseek.expert_kernel import expert_kernel_cost  # noqa: E402
from nxdi_deepseek.family import text_fields  # noqa: E402
from nxdi_deepseek.graph_cost.lowerer import Lowerer  # noqa: E402
from nxdi_deepseek.graph_cost.request import Request  # noqa: E402
from nxdi_deepseek.graph_cost.risk import format_risks  # noqa: E402
from nxdi_deepseek.graph_cost.time_model import Machine, bound  # noqa: E402
from nxdi_deepseek.mla import MAX_QUERY_BLOCKS, QUERY_BLOCK  # noqa: E402
from nxdi_deepseek.model_config import read_model_config  # noqa: E402
from nxdi_deepseek.planning.prompt_graph import largest_tensor, prompt_tensors  # noqa: E402
from nxdi_deepseek.planning.rank_memory import cache_bytes_per_token  # noqa: E402
from nxdi_deepseek.planning.weight_parts import weight_bytes  # noqa: E402
from nxdi_deepseek.weight_forms import BF16  # noqa: E402
from support.members import ALL  # noqa: E402
from support.released_sizes import SIZES  # noqa: E402

SHARDED_BY_INTERMEDIATE = {
    "blockwise_matmul_config": {"use_shard_on_intermediate_dynamic_while": True, "block_size": 256}
}
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
        (attention, "prefill", 1088, 2),
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


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("part", "tp_degree"), [("attention", 8), ("attention", 64), ("moe", 64)])
def test_padded_heads_cost_what_as_many_heads_do(lowerer, part, phase, tp_degree):
    """20 heads on 8 and on 64 ranks. The collectives are those of 4 ranks, which share the heads without padding."""

    def counted(tp_degree, heads=20):
        config = SIZES["GLM-4.7-Flash"] | {"num_attention_heads": heads}
        return lowerer.cost(Request(part, phase, 512, 1, tp_degree=tp_degree, config=config))

    padded = counted(tp_degree)
    assert padded == counted(tp_degree, heads=-(-20 // tp_degree) * tp_degree)
    kinds = [sorted((item.kind, item.count) for item in cost.collectives) for cost in (padded, counted(4))]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ALL)
def test_a_layer_of_every_member_lowers(lowerer, name):
    for phase in ("prefill", "decode"):
        counted = lowerer.cost(Request("moe", phase, 64, 2, tp_degree=2, config=dict(text_fields(ALL[name]))))
        assert sum(counted.dot_flops.values()) == counted.flop_counter > 0


@pytest.mark.parametrize("name", SIZES)
def test_a_layer_of_what_a_small_instance_runs_lowers(lowerer, name):
    """trn2.3xlarge: 4 ranks."""
    for phase in ("prefill", "decode"):
        counted = lowerer.cost(Request("moe", phase, 512, 1, tp_degree=4, config=SIZES[name]))
        assert sum(counted.dot_flops.values()) == counted.flop_counter > 0


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


EXPERT_WEIGHTS = EXPERTS * 3 * HIDDEN * C["moe_intermediate_size"] // TP
# Scales of an expert on a rank: of its channels, or of blocks of 128x32 in gate and up and 32x32 in down.
SCALES = {
    "fp8": EXPERTS * (2 * C["moe_intermediate_size"] // TP + HIDDEN),
    "fp8-block": EXPERTS * (2 * HIDDEN // 128 + HIDDEN // 32),
}


@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize(("length", "batch", "saved"), [(512, 1, 5e6), (4096, 8, 40e6)])
def test_decoding_reads_fp8_experts(lowerer, cost, form, length, batch, saved):
    graph = ("moe", "decode", length, batch)
    plain = cost(*graph)
    counted = lowerer.cost(Request(*graph, tp_degree=TP, config=C, neuron_config={"weights": form}))
    assert counted.min_bytes <= plain.min_bytes - saved
    assert counted.parameter_dtypes["F8E4M3FN"] == EXPERT_WEIGHTS
    assert plain.parameter_dtypes["BF16"] - counted.parameter_dtypes["BF16"] == 2 * EXPERT_WEIGHTS
    assert counted.parameter_dtypes["F32"] - plain.parameter_dtypes["F32"] == 4 * SCALES[form]
    assert counted.parameters_unread == plain.parameters_unread


@pytest.mark.parametrize(("matmul", "is_dequantized"), [({}, True), (SHARDED_BY_INTERMEDIATE, False)])
def test_scales_reach_the_expert_kernel_that_applies_them(lowerer, matmul, is_dequantized):
    """Ahead of the other kernel the weights of a whole layer are there in float32, 470 MB of gate and up."""
    neuron_config = {"weights": "fp8", **matmul}
    counted = lowerer.cost(Request("moe", "prefill", 512, 1, tp_degree=TP, config=C, neuron_config=neuron_config))
    gate_up = 4 * EXPERT_WEIGHTS * 2 // 3
    assert (counted.largest_intermediate_bytes == gate_up) == is_dequantized
    assert counted.parameter_dtypes["F8E4M3FN"] == EXPERT_WEIGHTS


@pytest.mark.parametrize(
    ("part", "length", "steps"),
    [
        ("moe", 512, ()),
        ("moe", 2048, ()),
        ("dense", 2048, ()),
        ("attention", 2048, ("attention",)),
        ("attention", 65536, ("attention",)),  # scores are larger than hidden states
    ],
)
def test_the_plan_knows_the_largest_tensor_of_a_prompt(cost, part, length, steps):
    tensors = prompt_tensors(read_model_config(C), TP, 1, length, "bfloat16", BF16)
    assert largest_tensor(tensors, *steps) == cost(part, "prefill", length, 1).largest_intermediate_bytes


def test_the_plan_knows_weights_and_cache_of_the_whole_model(cost):
    counted = cost("model", "prefill", 512, 1)
    model = read_model_config(C)
    assert counted.kv_bytes_per_token == cache_bytes_per_token(model, "bfloat16")
    rank_numbers = 4 * (1 + MOE_LAYERS)
    weights = sum(weight_bytes(model, TP, "bfloat16", BF16).values())
    assert 0 <= weights - counted.parameter_bytes <= rank_numbers


@pytest.mark.parametrize(
    ("graph", "gflop"), [(("decode", 512, 1), 0.0412), (("decode", 4096, 8), 0.462)], ids=["batch 1", "batch 8"]
)
def test_how_much_of_the_array_decoding_fills(cost, graph, gflop):
    """Ranks have 33 latents and 32 intermediate values: a quarter of the array's columns."""
    counted = cost("moe", *graph)
    assert sum(counted.dot_padded_flops.values()) / 1e9 == pytest.approx(gflop, rel=2e-3)
    router = graph[2] * (HIDDEN // 128) * (EXPERTS // 128)
    assert counted.dot_cycles["F32"] == 4 * router


def test_the_expert_kernel_is_counted_from_its_loops(cost):
    skipping = expert_kernel_cost(read_model_config(C), 512, TP, skip_token=True, skip_weight=True)
    counted = cost("moe", "prefill", 512, 1)
    assert counted.expert_kernel == skipping
    assert skipping.read_bytes + skipping.written_bytes <= 0.6e9
    assert counted.expert_kernel_weight_bytes == EXPERTS * mlp(1, C["moe_intermediate_size"])


def test_the_bound_of_a_prompt_has_what_the_expert_kernel_moves_without_skip_dma(lowerer):
    choice = {"use_shard_on_block_dynamic_while": True, "block_sharding_strategy": "PING_PONG", "block_size": 128}
    fields = {"blockwise_matmul_config": choice}
    counted = lowerer.cost(Request("moe", "prefill", 512, 1, tp_degree=TP, config=C, neuron_config=fields))
    assert counted.expert_kernel == expert_kernel_cost(read_model_config(C), 512, TP)
    assert 2.7e-3 < bound(counted, Machine()).memory < 2.9e-3


SAMPLED = {"do_sample": True, "dynamic": True, "deterministic": True, "global_topk": 256}


@pytest.mark.parametrize(
    ("sampling", "kernels", "gathered"),
    [
        ({"do_sample": False}, {"nkilib cascaded_max", "AwsNeuronArgMax"}, {"f32[64,1]", "s64[64,1]"}),
        (SAMPLED, {"nkilib topk", "nkilib cumsum"}, {"f32[16384,1]", "s64[16384,1]"}),
    ],
    ids=["greedy", "top-k and top-p"],
)
def test_tokens_chosen_on_the_device_are_counted(lowerer, sampling, kernels, gathered):
    """Each rank gives its best value, or its 256 best; none gathers the vocabulary."""
    config, fields = C | {"num_hidden_layers": 1}, {"on_device_sampling_config": sampling}
    counted = lowerer.cost(Request("model", "decode", 512, 1, tp_degree=TP, config=config, neuron_config=fields))
    assert kernels <= counted.kernel_calls.keys()
    payloads = {item.payload for item in counted.collectives}
    assert gathered <= payloads
    assert not any(str(C["vocab_size"]) in payload for payload in payloads)


def test_risky_instructions_are_told_with_their_lines(lowerer):
    """The router's sort is in float32, which no known graph has."""
    request = Request("moe", "decode", 512, 1, tp_degree=TP, config=C)
    text = format_risks([request], [lowerer.patterns(request)])
    sort = next(line for line in text.splitlines() if line.strip().startswith("sort"))
    assert "f32" in sort and "routing.py:" in sort and "moe decode 512 1" in sort
    assert "dot by" not in text and "published as running" in text.splitlines()[-1]


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
