"""FP8 experts in the device's graphs, at the degree of the device too: against Hugging Face on the same codes."""

import pytest
import torch
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.device_graphs.replicas import to_torch
from nxdi_deepseek.errors import CheckpointError
from nxdi_deepseek.example_configs import DEMO_CONFIG, WIDE_CONFIG
from support.dequantized import parts_of, write_dequantized
from support.device_graphs import assert_equals_hugging_face, load, written
from support.models import random_prompts

FORMS = ("fp8", "fp8-block")
SMALL = DEMO_CONFIG | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
# 16 columns on each of 64 ranks.
WIDE = WIDE_CONFIG | {"moe_intermediate_size": 1024, "num_hidden_layers": 2}
# The expert kernel takes hidden sizes of whole 512s, and 16 columns and more on each rank.
KERNEL = WIDE_CONFIG | {"hidden_size": 512, "num_hidden_layers": 2}
SHARDED_BY_INTERMEDIATE = {"use_shard_on_intermediate_dynamic_while": True, "block_size": 256}


def assert_right(tmp_path, config, compiled=None, **neuron):
    """Returns the graphs."""
    model_dir = written(tmp_path / "checkpoint", config)
    model, device = load(model_dir, compiled, batch_size=2, **neuron)
    judge = write_dequantized(tmp_path / "dequantized", model_dir, parts_of(model_dir, **neuron))
    assert_equals_hugging_face(model, judge, random_prompts((6, 14), config["vocab_size"]), 6)
    return device


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("config", "tp_degree"), [(SMALL, 2), (WIDE, 64)], ids=["TP 2", "TP 64"])
def test_all_ranks_together_equal_hugging_face_on_the_same_codes(tmp_path, config, tp_degree, form):
    device = assert_right(tmp_path, config, weights=form, tp_degree=tp_degree)
    for graph in device.graphs:
        lowered = graph.lowering.lowered
        dtypes = {
            name: lowered.graph.parameters[number].shapes[0].dtype
            for name, number in lowered.tensors.items()
            if ".mlp_op." in name
        }
        assert dtypes == {name: "F8E4M3FN" if name.endswith(".weight") else "F32" for name in dtypes}
        assert len(dtypes) == 4 * (config["num_hidden_layers"] - config["first_k_dense_replace"])


@pytest.mark.parametrize(
    ("form", "matmul", "kernel"),
    [
        ("fp8", {}, "BlockwiseMatmul"),
        ("fp8-block", {}, "BlockwiseMatmul"),
        ("fp8", {"blockwise_matmul_config": SHARDED_BY_INTERMEDIATE}, "BlockwiseMatmul, sharded by intermediate"),
        ("fp8-block", {"blockwise_matmul_config": SHARDED_BY_INTERMEDIATE}, "BlockwiseMatmul, sharded by intermediate"),
    ],
    ids=["channels", "blocks", "channels by intermediate", "blocks by intermediate"],
)
def test_the_expert_kernel_equals_hugging_face_on_the_same_codes(tmp_path, form, matmul, kernel):
    """The kernel sharded over blocks leaves scales out, and its form here refuses them: NxD dequantizes ahead of it."""
    device = assert_right(tmp_path, KERNEL, weights=form, tp_degree=2, **matmul)
    assert device.kernels[kernel] == KERNEL["num_hidden_layers"] - KERNEL["first_k_dense_replace"]


def test_rank_files_of_shard(tmp_path):
    model_dir = written(tmp_path / "checkpoint", SMALL)
    shard_checkpoint(model_dir, tmp_path / "compiled", 2, "float32", weights="fp8")
    device = assert_right(tmp_path, SMALL, tmp_path / "compiled", weights="fp8", tp_degree=2)
    held = device.tensors["layers.1.mlp.expert_mlps.mlp_op.down_proj.weight"]
    assert {to_torch(buffer).dtype for buffer in held} == {torch.float8_e4m3fn}
    with pytest.raises(CheckpointError, match="shard again for weights bf16, float32 and tp_degree 2"):
        load(model_dir, tmp_path / "compiled", batch_size=2, tp_degree=2)
    with pytest.raises(CheckpointError, match="shard again for weights fp8, bfloat16 and tp_degree 2"):
        load(model_dir, tmp_path / "compiled", batch_size=2, tp_degree=2, weights="fp8", torch_dtype=torch.bfloat16)
