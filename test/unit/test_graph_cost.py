"""Counting of HLO, made by hand, and what is computed and printed from the counts."""

import base64
import importlib.util
import json
from dataclasses import replace

import pytest
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import GraphCostError
from nxdi_deepseek.example_configs import RELEASED_CONFIG
from nxdi_deepseek.expert_kernel import expert_blocks, expert_kernel_cost
from nxdi_deepseek.graph_cost.count import Collective, GraphCost, bytes_read, count
from nxdi_deepseek.graph_cost.hlo import Graph, Shape
from nxdi_deepseek.graph_cost.kernels import expert_kernels
from nxdi_deepseek.graph_cost.lowerer import Lowerer
from nxdi_deepseek.graph_cost.patterns import Found, find_patterns, read_inventory
from nxdi_deepseek.graph_cost.request import Request
from nxdi_deepseek.graph_cost.risk import cut, format_risks
from nxdi_deepseek.graph_cost.table import format_comparison, format_costs
from nxdi_deepseek.graph_cost.time_model import Machine, bound
from nxdi_deepseek.model_config import read_model_config


class Hlo:
    """Writes a module as torch_xla does: numbers of 64 bits are strings, fields with their default are left out."""

    def __init__(self):
        self.instructions = []

    def add(self, opcode, dtype, dims, *operands, **fields):
        shape = {"elementType": dtype, "dimensions": [str(size) for size in dims], "isDynamicDimension": []}
        return self._append(opcode, shape, operands, fields)

    def parameter(self, number, dtype, *dims):
        return self.add("parameter", dtype, dims, **({"parameterNumber": str(number)} if number else {}))

    def tuple(self, *operands):
        shapes = [self.instructions[int(i) - 1]["shape"] for i in operands]
        return self._append("tuple", {"elementType": "TUPLE", "tupleShapes": shapes}, operands, {})

    def dot(self, dtype, dims, left, right, axis):
        numbers = {"lhsContractingDimensions": [str(axis)], "rhsContractingDimensions": ["0"]}
        return self.add("dot", dtype, dims, left, right, dotDimensionNumbers=numbers)

    def graph(self):
        """With the last instruction as its result."""
        entry = {"name": "entry", "instructions": self.instructions, "rootId": self.instructions[-1]["id"]}
        return Graph.from_json({"entryComputationName": "entry", "computations": [{"name": "add"}, entry]})

    def _append(self, opcode, shape, operands, fields):
        number = str(len(self.instructions) + 1)
        instruction = {"name": f"{opcode}.{number}", "opcode": opcode, "shape": shape, "id": number} | fields
        self.instructions.append(instruction | ({"operandIds": list(operands)} if operands else {}))
        return number


def test_dot_counts_a_multiplication_and_an_addition():
    hlo = Hlo()
    hlo.dot("BF16", (5, 7), hlo.parameter(0, "BF16", 5, 3), hlo.parameter(1, "BF16", 3, 7), axis=1)
    cost = count(hlo.graph())
    assert cost.dot_flops == {"BF16": 2 * 5 * 3 * 7}
    assert cost.min_bytes == cost.fused_bytes == 2 * (5 * 3 + 3 * 7 + 5 * 7)
    assert (cost.instructions, cost.largest_intermediate_bytes) == (3, 70)


def test_dots_are_counted_by_the_type_of_their_operands():
    hlo = Hlo()
    half, single = hlo.parameter(0, "BF16", 2, 2), hlo.parameter(1, "F32", 2, 2)
    hlo.tuple(hlo.dot("F32", (2, 2), half, half, 1), hlo.dot("F32", (2, 2), single, single, 1))
    assert count(hlo.graph()).dot_flops == {"BF16": 16, "F32": 16}


@pytest.mark.parametrize(
    ("dtype", "rows", "depth", "columns", "streamed", "passes"),
    [
        ("BF16", 512, 256, 256, 512 * 2 * 2, 1),
        ("F32", 512, 256, 256, 512 * 2 * 2, 4),
        ("BF16", 2, 300, 33, 2 * 3, 1),  # the operand of 33 columns stays in the array
        ("BF16", 33, 300, 2, 2 * 3, 1),
        ("F64", 128, 128, 1, 1, 4),
    ],
)
def test_what_a_dot_takes_of_the_array(dtype, rows, depth, columns, streamed, passes):
    hlo = Hlo()
    hlo.dot(dtype, (rows, columns), hlo.parameter(0, dtype, rows, depth), hlo.parameter(1, dtype, depth, columns), 1)
    cost = count(hlo.graph())
    assert cost.dot_padded_flops == {dtype: 2 * 128 * 128 * streamed}
    assert cost.dot_cycles == {dtype: passes * streamed}
    assert cost.dot_cycles_per_core == passes * streamed / 2


def test_rows_of_a_gather_are_read_and_not_the_table():
    hlo = Hlo()
    table, index = hlo.parameter(0, "BF16", 256, 10), hlo.parameter(1, "S32", 8)
    whole = hlo.add("slice", "BF16", (256, 10), table)
    hlo.add("gather", "BF16", (8, 10), hlo.add("convert", "F32", (256, 10), whole), index)
    graph = hlo.graph()
    assert bytes_read(graph.parameters[0]) == 8 * 10 * 2
    assert count(graph).min_bytes == 8 * 10 * 2 + 8 * 4 + 8 * 10 * 2


def test_slices_that_overlap_cost_no_more_than_the_whole():
    hlo = Hlo()
    weight, left = hlo.parameter(0, "BF16", 10, 4), hlo.parameter(1, "BF16", 2, 10)
    part = hlo.add("slice", "BF16", (6, 4), weight)
    dots = [hlo.dot("BF16", (2, 4), left, part, 1) for _ in range(2)]
    hlo.tuple(*dots)
    assert bytes_read(hlo.graph().parameters[0]) == 6 * 4 * 2
    hlo.tuple(*dots, hlo.dot("BF16", (2, 4), left, weight, 1))
    assert bytes_read(hlo.graph().parameters[0]) == 10 * 4 * 2


@pytest.mark.parametrize("opcode", ["scatter", "dynamic-update-slice"])
def test_a_cache_updated_in_place_costs_its_new_rows(opcode):
    hlo = Hlo()
    cache, rows, index = hlo.parameter(0, "BF16", 100, 4), hlo.parameter(1, "BF16", 3, 4), hlo.parameter(2, "S32")
    operands = (cache, index, rows) if opcode == "scatter" else (cache, rows, index)
    hlo.tuple(hlo.add(opcode, "BF16", (100, 4), *operands))
    cost = count(hlo.graph())
    assert cost.min_bytes == 2 * 3 * 4 * 2 + 4
    assert cost.largest_intermediate_bytes == 0


def test_a_parameter_handed_back_costs_nothing():
    hlo = Hlo()
    hlo.tuple(hlo.parameter(0, "BF16", 100), hlo.add("negate", "BF16", (2,), hlo.parameter(1, "BF16", 2)))
    assert count(hlo.graph()).min_bytes == 8


def test_fusion_keeps_what_is_read_twice():
    hlo = Hlo()
    x = hlo.parameter(0, "F32", 10)
    once = hlo.add("negate", "F32", (10,), hlo.add("exponential", "F32", (10,), x))
    assert count(hlo.graph()).fused_bytes == 40 + 40
    hlo.tuple(hlo.add("reduce", "F32", (), once), hlo.add("reduce", "F32", (), once))
    assert count(hlo.graph()).fused_bytes == (40 + 40) + 2 * (40 + 4)


def test_a_slice_reads_its_part():
    hlo = Hlo()
    part = hlo.add("slice", "F32", (4,), hlo.parameter(0, "F32", 10))
    hlo.add("reduce", "F32", (), part)
    assert count(hlo.graph()).fused_bytes == 16 + 4


def test_collectives_are_grouped_and_leave_out_the_ordering_scalar():
    hlo = Hlo()
    x, token = hlo.parameter(0, "BF16", 64), hlo.parameter(1, "BF16")
    first = hlo.add("all-reduce", "BF16", (64,), x, token)
    second = hlo.add("all-reduce", "BF16", (64,), first, token)
    hlo.tuple(hlo.add("all-gather", "BF16", (512,), second), hlo.add("reduce-scatter", "BF16", (8,), second))
    cost = count(hlo.graph())
    assert cost.collectives == [
        Collective("all-reduce", "bf16[64]", 128, 2),
        Collective("all-gather", "bf16[512]", 1024, 1),
        Collective("reduce-scatter", "bf16[64]", 128, 1),
    ]
    assert cost.collective_count == 4


def blockwise_matmul(hlo, **sizes):
    config = base64.b64encode(json.dumps(sizes).encode()).decode()
    call = {"customCallTarget": "BlockwiseMatmul", "backendConfig": config}
    return hlo.add("custom-call", "BF16", (4, 16), hlo.parameter(0, "BF16", 4, 16), **call)


def test_kernel_flops_follow_the_formula():
    hlo = Hlo()
    blockwise_matmul(hlo, blocks=263, block_size=512, hidden=7168, intermediate=32)
    cost = count(hlo.graph())
    assert cost.kernel_flops == {"BlockwiseMatmul": 263 * 512 * 3 * 2 * 7168 * 32}
    assert cost.flops == 185321127936


def expert_layer(tokens, sharded_by="block", **skip):
    """The released model's expert kernel at TP 64."""
    hlo = Hlo()
    shapes = ([tokens + 1, 7168], [(tokens + 1) * 256, 1], [256, 7168, 2, 32], [256, 32, 7168])
    operands = [hlo.parameter(number, "BF16", *dims) for number, dims in enumerate(shapes)]
    blocks = expert_blocks(tokens, 256, 8, 128)
    sizes = {"blocks": blocks, "block_size": 128, "hidden": 7168, "intermediate": 32, "tokens": tokens}
    sizes |= {"skip_token": False, "skip_weight": False, "sharded_by": sharded_by} | skip
    config = base64.b64encode(json.dumps(sizes).encode()).decode()
    call = {"customCallTarget": "BlockwiseMatmul", "backendConfig": config}
    hlo.add("custom-call", "BF16", (tokens + 1, 7168), *operands, **call)
    return hlo.graph()


@pytest.mark.parametrize("skip", [{}, {"skip_token": True, "skip_weight": True}], ids=["all", "skip"])
def test_the_expert_kernel_of_a_graph_is_that_of_the_config(skip):
    kernel, weights = expert_kernels(expert_layer(512, **skip), top_k=8)
    assert kernel == expert_kernel_cost(read_model_config(RELEASED_CONFIG), 512, 64, **skip)
    assert weights == 256 * 3 * 7168 * 32 * 2
    assert expert_kernels(expert_layer(512, "hidden", **skip), 8)[0] == replace(kernel, instructions=None)


def test_a_graph_without_expert_kernel_has_none():
    hlo = Hlo()
    hlo.parameter(0, "BF16", 8)
    assert expert_kernels(hlo.graph(), 8) == (None, 0)


def test_the_bound_has_what_the_expert_kernel_moves():
    """2,008 MB at 725 GB/s, where the weights read once take 0.49 ms."""
    graph = expert_layer(512)
    kernel, weights = expert_kernels(graph, 8)
    cost = replace(count(graph), expert_kernel=kernel, expert_kernel_weight_bytes=weights)
    tokens, affinities = 2 * 513 * 7168 * 2, 513 * 256 * 2
    moved = kernel.read_bytes + kernel.written_bytes
    assert cost.min_bytes == weights + tokens + affinities
    assert bound(cost, Machine()).memory == (moved + tokens + affinities) / Machine().hbm_bytes
    assert bound(cost, Machine()).memory == pytest.approx(2.77e-3, rel=0.01)
    assert GraphCost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost
    request = Request.parse("moe,prefill,512,1")
    line = format_costs([request], [cost], Machine()).splitlines()[2]
    assert "expert kernel: 50.4 of 202 GFLOP (25% of the array), 4.1 Mcycles and 51,129 instructions per core" in line


def test_dynamic_shapes_are_an_error():
    hlo = Hlo()
    hlo.add("negate", "F32", (8,), hlo.parameter(0, "F32", 8))
    hlo.instructions[-1]["shape"]["isDynamicDimension"] = [True]
    with pytest.raises(GraphCostError, match="negate.2 has a dynamic shape"):
        count(hlo.graph())


@pytest.mark.parametrize(
    ("opcode", "fields", "message"),
    [
        ("while", {}, "HLO while while.2 cannot be counted"),
        ("custom-call", {"customCallTarget": "Other"}, "custom call Other has no formula"),
    ],
)
def test_what_cannot_be_counted_is_an_error(opcode, fields, message):
    hlo = Hlo()
    hlo.add(opcode, "F32", (8,), hlo.parameter(0, "F32", 8), **fields)
    with pytest.raises(GraphCostError, match=message):
        count(hlo.graph())


def test_unknown_element_type_is_an_error():
    with pytest.raises(GraphCostError, match="C64"):
        _ = Shape("C64", (2,)).bytes


def small_cost(collectives=1):
    hlo = Hlo()
    x = hlo.parameter(0, "BF16", 1000, 1000)
    value = hlo.dot("BF16", (1000, 1000), x, x, 1)
    for _ in range(collectives):
        value = hlo.add("all-reduce", "BF16", (1000, 1000), value)
    return count(hlo.graph())


def test_bound_is_the_slower_of_compute_and_memory_and_the_collectives():
    machine = Machine(bf16_flops=1e12, f32_flops=1e11, hbm_bytes=1e9, link_bytes=1e9, collective_seconds=1e-5)
    limit = bound(small_cost(), machine)
    assert limit.compute == pytest.approx(2e-3)
    assert limit.memory == pytest.approx(4e-3)
    assert limit.collectives == pytest.approx(1e-5 + 2 * 2e-3)
    assert limit.total == pytest.approx(limit.memory + limit.collectives)


def test_table_and_comparison():
    request = Request.parse("attention,prefill,512,1")
    table = format_costs([request], [small_cost()], Machine()).splitlines()
    assert table[0].split()[:2] == ["graph", "GFLOP"]
    assert table[1].startswith("attention prefill 512 1")
    # 1000 rows pass 8 by 8 arrays, which have room for 1024 by 1024.
    assert table[2] == "  dots: 2 of 2.1 GFLOP (95% of the array), 0.032 Mcycles per core"
    assert table[3] == "  1 x all-reduce bf16[1000,1000]"
    lines = format_comparison([request], [small_cost(3)], [small_cost(1)], Machine()).splitlines()
    assert lines[0].split() == ["graph", "figure", "other", "ours", "ratio"]
    assert [line.split()[-3:] for line in lines if "collectives" in line] == [["3", "1", "3.00"]]


def test_request_survives_its_journey():
    request = Request.parse("moe,decode,4096,8", tp_degree=32, config={"hidden_size": 8}, impl="folder")
    assert Request.from_json(request.to_json()) == request
    assert str(request) == "moe decode 4096 8"


@pytest.mark.parametrize(
    ("fields", "dense", "moe"),
    [
        ({}, 0, 3),
        ({"first_k_dense_replace": 0}, None, 0),
        ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, 0, 4),
        ({"first_k_dense_replace": 2, "num_hidden_layers": 2}, 0, None),
    ],
)
def test_a_part_is_taken_from_the_first_layer_of_its_kind(fields, dense, moe):
    requests = [
        Request(part, "prefill", 8, 1, config=RELEASED_CONFIG | fields) for part in ("dense", "moe", "attention")
    ]
    assert [request.layer for request in requests] == [dense, moe, 0]


@pytest.mark.parametrize("text", ["moe", "moe,decode,x,1", "experts,decode,1,1", "moe,train,1,1", "moe,decode,0,1"])
def test_bad_graphs_are_named(text):
    with pytest.raises(GraphCostError, match=f"graph '{text}'"):
        Request.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "--compare needs --impl"),
        (["--impl", "/nowhere"], "holds no modeling_deepseek.py"),
        (["--model-dir", "/nowhere"], "/nowhere/config.json: no such file"),
        (["--tp-degree", "3"], "tp_degree 3 does not divide hidden_size 7168"),
        (["--tp-degree", "0"], "tp_degree 0 must be at least 1"),
        (["--tp-degree", "-64"], "tp_degree -64 must be at least 1"),
        (["--neuron-config", "{"], "is not JSON"),
        (["--neuron-config", "[]"], "is not a JSON object"),
        (["--neuron-config", '{"tp_degree": 8}'], "holds tp_degree, which other arguments say"),
        (["--hbm", "0"], "must be above 0"),
        (["--link", "nan"], "must be above 0"),
        (["--tp-degree", "many"], "invalid int value"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    assert main(["graph-cost", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "graph", "message"),
    [
        ({"num_attention_heads": "128"}, "model,decode,8,1", "num_attention_heads '128' must be a whole number"),
        ({"model_type": "llama"}, "model,decode,8,1", "model_type 'llama' is not supported"),
        ({"first_k_dense_replace": 0}, "dense,decode,8,1", "graph dense decode 8 1: the model has no dense layer"),
    ],
)
def test_a_config_that_cannot_be_lowered_is_told_before_a_process_starts(tmp_path, capsys, fields, graph, message):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG | fields))
    assert main(["graph-cost", graph, "--model-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_process_that_dies_at_its_start_is_one_line(monkeypatch):
    monkeypatch.setattr("nxdi_deepseek.graph_cost.lowerer.sys.executable", "false")
    with Lowerer() as lowerer, pytest.raises(GraphCostError, match="moe decode 8 1: the lowering process failed"):
        lowerer.cost(Request("moe", "decode", 8, 1))


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is installed")
def test_what_is_missing_is_told_in_one_line(capfd):
    assert main(["graph-cost", "attention,decode,512,1"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "needs torch_xla" in error or "no NxDI" in error


def patterns_of(hlo):
    entry = {"id": "9", "name": "entry", "instructions": hlo.instructions, "rootId": hlo.instructions[-1]["id"]}
    added = {"id": "7", "name": "add", "instructions": [{"opcode": "parameter"}, {"opcode": "add"}]}
    frames = {
        "fileNames": ["/x/torch/functional.py", "/x/routing.py"],
        "functionNames": ["einsum", "select_experts"],
        "fileLocations": [
            {"fileNameId": 1, "functionNameId": 1, "line": 4},
            {"fileNameId": 2, "functionNameId": 2, "line": 33},
        ],
        "stackFrames": [{"fileLocationId": 2}, {"fileLocationId": 1, "parentFrameId": 1}],
    }
    return find_patterns({"entryComputationName": "entry", "computations": [added, entry], "stackFrameIndex": frames})


def test_patterns_have_ranks_where_work_depends_on_the_shape():
    hlo = Hlo()
    x = hlo.parameter(0, "F32", 4, 8)
    hlo.add("negate", "F32", (4, 8), x)
    hlo.add("negate", "F32", (32,), x)
    hlo.add("reduce", "F32", (4,), x, calledComputationIds=["7"], metadata={"stackFrameId": 2})
    hlo.add("all-gather", "BF16", (12,), hlo.parameter(1, "BF16", 3))
    hlo.add("concatenate", "F32", (8, 8), x, x)
    found = {item.pattern: (item.count, item.places) for item in patterns_of(hlo)}
    assert found == {
        "negate f32 of f32": (2, ()),
        "reduce by add f32 rank 1 of f32 rank 2": (1, ("routing.py:33 select_experts",)),
        "all-gather bf16 rank 1 of bf16 rank 1, not of a multiple of 4 bytes": (1, ()),
        "concatenate f32 rank 2 of f32 rank 2": (1, ()),
    }


def test_what_no_known_graph_has_is_told_once_with_its_graphs():
    requests = [Request.parse(text) for text in ("model,prefill,128,1", "model,decode,512,1")]
    odd = Found("sort by compare f16 rank 7 of f16 rank 7", 3, ("a.py:1 f", "b.py:2 g", "c.py:3 h", "d.py:4 i"))
    models, known = read_inventory()
    common = Found(next(iter(known)), 1, ())
    head, line, lineage = format_risks(requests, [[odd, common], [odd]]).splitlines()
    assert head == "1 kinds of instructions in 2 graphs that no known graph has:"
    assert "3 in model prefill 128 1, 3 in model decode 512 1 (a.py:1 f; b.py:2 g; c.py:3 h; 1 more)" in line
    assert all(model in lineage for model in models) and "compiled none" in lineage


def test_the_inventory_names_models_for_every_pattern():
    models, known = read_inventory()
    assert {"Llama", "Mixtral", "Qwen3-MoE", "DeepSeek-V3 (contrib)"} <= set(models)
    assert all(known.values()) and {name for names in known.values() for name in names} == set(models)


@pytest.mark.parametrize(
    ("layers", "kept"), [({}, 4), ({"first_k_dense_replace": 0}, 1), ({"num_hidden_layers": 2}, 1)]
)
def test_risk_lowers_a_layer_of_each_kind(layers, kept):
    request = Request.parse("model,decode,512,1", config=RELEASED_CONFIG | layers)
    assert cut(request)["num_hidden_layers"] == kept
