"""A tiny checkpoint of every member of the family, in the layout in which it is released, with the judge's goldens."""

import json
import os
import subprocess
import sys

import pytest
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from safetensors.torch import load_file

from support import judge_goldens
from support.models import V3, YARN, random_prompts

NEW_TOKENS = 48
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

MEMBERS = {
    "DeepSeek-V2": V2 | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "topk_group": 2},
    "DeepSeek-V2-Lite": V2
    | {"topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
}


def write_member(folder, name, seed):
    """The checkpoint with prompts.json; float32 throughout."""
    write_checkpoint(folder, MEMBERS[name], seed)
    (folder / "prompts.json").write_text(json.dumps(random_prompts(PROMPT_LENGTHS, seed=seed)))


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
