"""The members of the family: one row each, from which config, router, layout, registration and references read.

A member that differs by config only is a row here and its judge in the tests (docs/adding-a-model.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    grouping: how a group of experts is rated, a key of routing.GROUP_RATING. topk_method: config.json's name for
    scoring and grouping together. has_experts: whether a layer (config, index) has experts. correction_bias: whether
    the router has the tensor that corrects the load. judge: the class of transformers whose logits are right.
    """

    model_type: str
    architectures: tuple[str, ...]
    scoring: str
    grouping: str
    topk_method: str
    has_experts: Callable[["ModelConfig", int], bool]
    correction_bias: bool
    judge: str


FAMILY = {
    member.model_type: member
    for member in (
        Member(
            model_type="deepseek_v3",
            architectures=("DeepseekV3ForCausalLM",),
            scoring="sigmoid",
            grouping="two best",
            topk_method="noaux_tc",
            has_experts=dense_then_experts,
            correction_bias=True,
            judge="DeepseekV3ForCausalLM",
        ),
        Member(
            model_type="kimi_k2",
            architectures=("KimiK2ForCausalLM", "DeepseekV3ForCausalLM"),
            scoring="sigmoid",
            grouping="two best",
            topk_method="noaux_tc",
            has_experts=dense_then_experts,
            correction_bias=True,
            judge="DeepseekV3ForCausalLM",
        ),
    )
}
ARCHITECTURES = tuple(dict.fromkeys(name for member in FAMILY.values() for name in member.architectures))


def member_of(model_type: str) -> Member:
    """The row of a model_type. Raises ConfigError for one that is not supported."""
    if model_type not in FAMILY:
        raise ConfigError(f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(FAMILY)}")
    return FAMILY[model_type]
