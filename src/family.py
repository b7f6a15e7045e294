"""The members of the family: one row each, from which config, router, layout, registration and references read.

A member that differs by config only is a row here and its judge in the tests (docs/adding-a-model.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .model_config import ModelConfig


def dense_then_experts(config: "ModelConfig", layer: int) -> bool:
    """The first layers are dense; of the others every moe_layer_freq-th has experts."""
    return layer >= config.first_k_dense_replace and layer % config.moe_layer_freq == 0


@dataclass(frozen=True)
class Member:
    """A model_type of config.json, and what follows from it.

    architectures: the first is the released one. scoring: how logits become affinities, a key of routing.SCORING.
    grouping: for each topk_method of config.json how a group of experts is rated, a key of routing.GROUP_RATING, None
    where groups do not count; the first is meant where config.json names none. correction_bias: whether the router has
    the tensor that corrects the load. judge: the class of transformers whose logits are right. has_experts: whether a
    layer (config, index) has experts. defaults: what a field means where config.json lacks it, if not what it means for
    DeepSeek-V3. fixed: fields that have one value only, since the judge has no use for others.
    """

    model_type: str
    architectures: tuple[str, ...]
    scoring: str
    grouping: Mapping[str, str | None]
    correction_bias: bool
    judge: str
    has_experts: Callable[["ModelConfig", int], bool] = dense_then_experts
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


_TWO_BEST = {"noaux_tc": "two best"}
FAMILY = {
    member.model_type: member
    for member in (
        Member(
            model_type="deepseek_v3",
            architectures=("DeepseekV3ForCausalLM",),
            scoring="sigmoid",
            grouping=_TWO_BEST,
            correction_bias=True,
            judge="DeepseekV3ForCausalLM",
        ),
        Member(
            model_type="kimi_k2",
            architectures=("KimiK2ForCausalLM", "DeepseekV3ForCausalLM"),
            scoring="sigmoid",
            grouping=_TWO_BEST,
            correction_bias=True,
            judge="DeepseekV3ForCausalLM",
        ),
        Member(
            model_type="deepseek_v2",
            architectures=("DeepseekV2ForCausalLM",),
            scoring="softmax",
            grouping={"greedy": None, "group_limited_greedy": "maximum"},
            correction_bias=False,
            judge="DeepseekV2ForCausalLM",
            defaults={"norm_topk_prob": False},
            fixed={"norm_topk_prob": False},
        ),
    )
}
ARCHITECTURES = tuple(dict.fromkeys(name for member in FAMILY.values() for name in member.architectures))
# Relatives that differ by more than config: model_type -> what is not implemented.
_NOT_IMPLEMENTED = {
    "deepseek_v32": "sparse attention (its indexer)",
    "glm_moe_dsa": "sparse attention (its indexer)",
    "deepseek_v4": "compressed and hybrid attention",
    "longcat_flash": "zero experts and two attentions in a layer",
    "kimi_linear": "linear attention",
}


def member_of(model_type: str) -> Member:
    """The row of a model_type. Raises ConfigError for one that is not supported."""
    if model_type in _NOT_IMPLEMENTED:
        what = _NOT_IMPLEMENTED[model_type]
        raise ConfigError(f"config.json: model_type {model_type!r} is not supported: {what} is not implemented")
    if model_type not in FAMILY:
        raise ConfigError(f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(FAMILY)}")
    return FAMILY[model_type]
