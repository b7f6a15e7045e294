"""Bytes of the weights of one rank, by part of the model, from the layout table."""

import re
from collections import Counter
from functools import lru_cache

from ..checkpoint.header import TensorEntry, build_header
from ..checkpoint.parts import DRAFT, MODEL, rank_layout
from ..dtypes import model_dtype
from ..model_config import ModelConfig
from ..weight_forms import WeightForm

# The first pattern that a tensor's Neuron name holds says its part.
_PARTS = (
    (r"^embed_tokens\.", "embedding"),
    (r"^lm_head\.", "head"),
    (r"norm\.|\.router\.|\.rank$", "norms, router"),
    (r"\.self_attn\.", "attention"),
    (r"\.shared_experts\.", "shared experts"),
    (r"\.expert_mlps\..*\.scale$", "expert scales"),
    (r"\.expert_mlps\.", "experts"),
    (r"\.mlp\.", "dense MLP"),
    (r"^fc\.", "MTP projection"),
)
WEIGHT_PARTS = (
    "embedding",
    "attention",
    "dense MLP",
    "experts",
    "expert scales",
    "shared experts",
    "norms, router",
    "head",
)


@lru_cache(maxsize=64)
def weight_bytes(
    config: ModelConfig, tp_degree: int, dtype: str, form: WeightForm, part: str = MODEL
) -> dict[str, int]:
    """Bytes of one rank by part, in the order of WEIGHT_PARTS; all ranks have the same. part: MODEL, or DRAFT, which
    has one more.

    Raises ConfigError where `tp_degree` ranks cannot share the model, or the form is not to be had for them.
    """
    form.check(config, tp_degree)
    parts: Counter[str] = Counter()
    for name, entry in _entries(config, tp_degree, dtype, form, part)[1].items():
        parts[part_of_rank_tensor(name)] += entry.nbytes
    return {name: parts[name] for name in (*WEIGHT_PARTS, *(("MTP projection",) if part == DRAFT else ()))}


def part_of_rank_tensor(name: str) -> str:
    """The part that a tensor of a rank file belongs to, by its Neuron name."""
    return next(part for pattern, part in _PARTS if re.search(pattern, name))


def rank_file_bytes(config: ModelConfig, tp_degree: int, dtype: str, form: WeightForm, part: str = MODEL) -> int:
    """Size of one rank's file, its header included."""
    form.check(config, tp_degree)
    head, entries = _entries(config, tp_degree, dtype, form, part)
    return len(head) + sum(entry.nbytes for entry in entries.values())


def _entries(
    config: ModelConfig, tp_degree: int, dtype: str, form: WeightForm, part: str
) -> tuple[bytes, dict[str, TensorEntry]]:
    return build_header(rank_layout(config, tp_degree, model_dtype(dtype), form, part))
