"""The large tensors of the prompt graph on one rank, as formulas of the config.

test/integration/test_graph_cost.py compares them with the largest intermediates of the lowered graph. What the compiler
really keeps at a time nobody but the compiler knows.
"""

from ..dtypes import BY_TORCH
from ..expert_kernel import CORES
from ..mla import MAX_QUERY_BLOCKS, QUERY_BLOCK
from ..model_config import ModelConfig
from ..weight_forms import WeightForm

_FLOAT32, _FLOAT64 = 4, 8


def prompt_tensors(
    config: ModelConfig, tp_degree: int, batch: int, length: int, dtype: str, form: WeightForm, prefix: int = 0
) -> dict[str, dict[str, int]]:
    """Bytes of the tensors of each step of a layer that live at one time, by step and name, for `batch` prompts of
    `length` tokens behind `prefix` cached ones, which are expanded with them. Steps whose layers the model lacks are left out."""
    item, tokens = BY_TORCH[dtype].item_bytes, batch * length
    hidden = tokens * config.hidden_size
    heads = batch * config.num_attention_heads // tp_degree or 1
    keys = prefix + length
    scores = heads * _query_rows(length) * keys
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    steps = {
        "norm": {"input": hidden * item, "in float32": hidden * _FLOAT32},
        "attention": {
            "queries": heads * length * key * item,
            "keys": heads * keys * key * item,
            "keys and values": heads * keys * (config.qk_nope_head_dim + config.v_head_dim) * item,
            "scores": scores * _FLOAT32,
            "probabilities": scores * item,
            "output": hidden * item,
        },
    }
    kinds = {config.has_experts(layer) for layer in range(config.num_hidden_layers)}
    if False in kinds:
        width = config.intermediate_size // tp_degree
        steps["dense MLP"] = {"gate and up": 2 * tokens * width * item, "output": hidden * item}
    if True in kinds:
        steps["experts"] = _experts(config, tp_degree, tokens, item, form)
    return steps


def _experts(config: ModelConfig, tp_degree: int, tokens: int, item: int, form: WeightForm) -> dict[str, int]:
    experts, hidden = config.n_routed_experts, config.hidden_size
    tensors = {
        "affinities": tokens * experts * _FLOAT32,
        "count of tokens": 2 * tokens * experts * _FLOAT64,  # NxD's mask and its running sum
        "output of each core": CORES * tokens * hidden * item,
    }
    if form.is_fp8:
        weights = 3 * experts * hidden * config.moe_intermediate_size // tp_degree
        # NxD decodes a whole layer ahead of the kernel, one projection in float32 after the other.
        tensors |= {"dequantized experts": weights * item, "gate and up in float32": weights * 2 // 3 * _FLOAT32}
    return tensors


def _query_rows(length: int) -> int:
    """Rows of scores that are made at a time, as in mla.expanded_attention."""
    return min(length, max(QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS)))


def largest_tensor(tensors: dict[str, dict[str, int]], *steps: str) -> int:
    """Bytes of the largest tensor of some steps, by default of all."""
    return max(size for step in steps or tensors for size in tensors[step].values())


def activation_peak(tensors: dict[str, dict[str, int]]) -> int:
    """Bytes of the step that needs most, with the residual beside it."""
    return tensors["norm"]["input"] + max(sum(step.values()) for step in tensors.values())
