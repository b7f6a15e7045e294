"""Heads that ranks do not divide are padded, on every backend; a test module runs it by importing all of it."""

import pytest
from nxdi_deepseek import backend
from nxdi_deepseek.accuracy.reference import hugging_face_model
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint

from support import models, nxdi
from support.dequantized import parts_of, write_dequantized
from support.models import V3, greedy, load_model, random_prompts
from support.parity_suite import assert_same_choice, teacher_forced

# At 4 ranks, 3 heads leave one rank without any, 5 leave one without and another with one of two.
WITHOUT_Q_LATENT = {"num_attention_heads": 3, "q_lora_rank": None, "kv_lora_rank": 64}
WIDE_VALUES = {"num_attention_heads": 5, "qk_nope_head_dim": 24, "v_head_dim": 40, "moe_intermediate_size": 128}
CONFIGS = {3: V3 | WITHOUT_Q_LATENT, 5: V3 | WIDE_VALUES}
# The heads of the model, and the form of its experts.
CASES = ((3, "bf16"), (5, "bf16"), (5, "fp8"), (5, "fp8-block"))
PROMPTS = random_prompts((9, 1))
WHOLE = backend.NAME == "nxdi"  # whose CPU mode cuts the whole model's tensors for its ranks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder for each number of heads."""
    folders = {heads: tmp_path_factory.mktemp("heads") for heads in CONFIGS}
    for heads, folder in folders.items():
        write_checkpoint(folder, CONFIGS[heads])
    return folders


def generate_cases_on_rank(folders, tp_degree):
    """Runs in a process of its own, which takes longer to start than to generate."""
    batch = {"batch_size": len(PROMPTS), "tp_degree": tp_degree}
    return [greedy(load_model(folders[heads], weights=form, **batch), PROMPTS, 8) for heads, form in CASES]


def judge_of(folder, form, tp_degree, dequantized):
    """Hugging Face's model; of FP8 experts on the values of our own codes."""
    if form != "bf16":
        folder = write_dequantized(dequantized, folder, parts_of(folder, WHOLE, weights=form, tp_degree=tp_degree))
    return hugging_face_model(folder)


@pytest.mark.parametrize("tp_degree", [2, 4])
def test_ranks_with_padded_heads_equal_hugging_face(checkpoints, tmp_path, tp_degree):
    initialize = nxdi.init_cpu_parallel if backend.NAME == "nxdi" else models.init_embedded
    ranks = nxdi.run_parallel(generate_cases_on_rank, tp_degree, checkpoints, tp_degree, initialize=initialize)
    for i, (heads, form) in enumerate(CASES):
        judge = judge_of(checkpoints[heads], form, tp_degree, tmp_path / f"{heads} {form}")
        for row, prompt in enumerate(PROMPTS):
            for tokens, logits in (of_rank[i] for of_rank in ranks):
                assert_same_choice(tokens[row], logits[row], teacher_forced(judge, prompt, tokens[row]))
