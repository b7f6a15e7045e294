"""A tiny checkpoint of every member of the family, in the layout in which it is released, with the judge's goldens."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from safetensors.torch import load_file, save_file

from support import judge_goldens
from support.models import CONFIGS, V3, YARN, random_prompts

NEW_TOKENS = 48
SEEDS = (0, 1)
PROMPT_LENGTHS = (9, 1, 23)
# Where the makefile puts the environment with the newest transformers, unless a variable names its interpreter.
NEWEST = os.environ.get(
    "NEWEST_TRANSFORMERS_PYTHON", f"{sys.prefix.removesuffix('-newest-transformers')}-newest-transformers/bin/python"
)


def _member(model_type, architecture, **fields):
    return {**V3, "model_type": model_type, "architectures": [architecture], **fields}


def _without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


V2 = _without(
    _member("deepseek_v2", "DeepseekV2ForCausalLM", scoring_func="softmax", norm_topk_prob=False, n_shared_experts=2),
    "rope_scaling",
) | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}

GLM = _member("glm4_moe_lite", "Glm4MoeLiteForCausalLM", n_group=1, topk_group=1, routed_scaling_factor=1.8)
GLM |= {"qk_nope_head_dim": 24, "v_head_dim": 40, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000}
# Without this field the judge has one dense layer; with it, those that the list tells.
GLM = _without(GLM, "first_k_dense_replace", "moe_layer_freq") | {"num_nextn_predict_layers": 1}

SARVAM = _member("sarvam_mla", "SarvamMLAForCausalLM", q_lora_rank=None, head_dim=64, num_experts=20)
SARVAM |= {"num_shared_experts": 1, "n_group": 1, "topk_group": 1, "rope_scaling": YARN | {"type": "deepseek_yarn"}}
SARVAM = _without(SARVAM, "n_routed_experts", "n_shared_experts")

AXK1 = _member("axk1", "AXK1ForCausalLM", moe_layer_freq=2, num_hidden_layers=5, first_k_dense_replace=1)

MISTRAL = _member("mistral4", "Mistral4ForCausalLM", scoring_func="softmax", first_k_dense_replace=0)
MISTRAL |= {"qk_nope_head_dim": 16, "v_head_dim": 32, "qk_rope_head_dim": 16, "pad_token_id": 11}
MISTRAL = _without(MISTRAL, "rope_scaling", "rope_theta", "topk_method") | {
    "rope_parameters": _without(YARN, "type")
    | {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "original_max_position_embeddings": 16}
    | {"llama_4_scaling_beta": 0.1, "max_position_embeddings": V3["max_position_embeddings"]}
    | {"partial_rotary_factor": 0.5},
}

KIMI_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KIMI = {
    "model_type": "kimi_k25",
    "architectures": ["KimiK25ForConditionalGeneration"],
    "text_config": V3 | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    "vision_config": KIMI_VISION | {"model_type": "kimi_k25_vision"},
    "tie_word_embeddings": False,
}

PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
SMALL_4 = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "text_config": MISTRAL,
    "vision_config": PIXTRAL,
    "tie_word_embeddings": False,
}

MEMBERS = {
    "DeepSeek-V2": V2 | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "topk_group": 2},
    "DeepSeek-V2-Lite": V2
    | {"topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "GLM-4.7-Flash": GLM | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "GLM, other layers dense": GLM | {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    "sarvam-105b": SARVAM,
    "Kimi-K2.5": KIMI,
    "A.X-K1": AXK1,
    "Mistral-Small-4": SMALL_4,
    "mistral4 with groups": MISTRAL | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
}
# And those that the parity suite compares with their judge.
ALL = MEMBERS | {
    "DeepSeek-V3": V3 | {"num_nextn_predict_layers": 1},
    "Kimi-K2": CONFIGS["one group (Kimi-K2)"] | {"model_type": "kimi_k2", "architectures": ["KimiK2ForCausalLM"]},
    "Moonlight": CONFIGS["no q_lora (Moonlight)"],
}


def write_member(folder, name, seed):
    """The checkpoint in float32, laid out as released, with prompts.json."""
    config = ALL[name]
    write_checkpoint(folder, config, seed, shards=1)
    (file,) = folder.glob("*.safetensors")
    release = RELEASES.get(config["model_type"], lambda tensors: tensors)
    save_file(release(load_file(file)), folder / "model.safetensors", metadata={"format": "pt"})
    file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "prompts.json").write_text(json.dumps(random_prompts(PROMPT_LENGTHS, seed=seed)))


@functools.cache
def released(folder_of_all):
    """(member, seed) -> its folder with goldens. One process of the judges makes them all, once in a session."""
    folders = {(name, seed): folder_of_all / "members" / f"{name}, {seed}" for name in MEMBERS for seed in SEEDS}
    for (name, seed), folder in folders.items():
        write_member(folder, name, seed)
    write_goldens(folders.values())
    return folders


def _behind_prefix(tensors, vision="vision_tower.encoder.blocks.0.norm"):
    vision = {f"{vision}{i}.weight": torch.ones(16) for i in (0, 1)}
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()} | vision


def _with_unused_norms(tensors):
    norm = "post_mlp_layernorm.weight"
    layers = {name.partition("input_layernorm")[0] for name in tensors if "input_layernorm" in name}
    return {layer + norm: torch.full((AXK1["hidden_size"],), 7.0) for layer in layers} | tensors


def _with_fused_experts(tensors):
    experts = MISTRAL["n_routed_experts"]
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for prefix in {name.partition("experts.")[0] + "experts." for name in tensors if ".mlp.experts." in name}:
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{e}.{proj}_proj.weight"] for e in range(experts)])
            for proj in ("gate", "up", "down")
        )
        fused |= {prefix + "gate_up_proj": torch.cat((gate, up), dim=1), prefix + "down_proj": down}
    return fused


def _as_small_4(tensors):
    return _behind_prefix(_with_fused_experts(tensors), "multi_modal_projector.norm")


RELEASES = {"kimi_k25": _behind_prefix, "axk1": _with_unused_norms}
RELEASES |= {"mistral4": _with_fused_experts, "mistral3": _as_small_4}


def write_goldens(folders):
    """Runs the judge in the environment that has it; skips where there is none."""
    if not os.path.exists(NEWEST):
        pytest.skip(f"no interpreter with transformers 5 at {NEWEST}: `make test-newest-transformers` makes one")
    command = [NEWEST, judge_goldens.__file__, str(NEW_TOKENS), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def load_goldens(folder):
    """prompts, tokens [3, T], logits [3, T, V]."""
    found = load_file(folder / "goldens.safetensors")
    return json.loads((folder / "prompts.json").read_text()), found["tokens"], found["logits"]
