"""The members of the family: one row each, from which config, router, layout, registration and references read.

A member that differs by config only is a row here and its judge in the tests (docs/adding-a-model.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .model_config import ModelConfig


def dense_then_experts(config: "ModelConfig", layer: int) -> bool:
    """The first layers are dense; of the others every moe_layer_freq-th has experts."""
    return layer >= config.first_k_dense_replace and layer % config.moe_layer_freq == 0


def listed_layers(config: "ModelConfig", layer: int) -> bool:
    """What mlp_layer_types says of the layer; the first layers are dense where config.json has no such list."""
    kinds = config.mlp_layer_types
    return dense_then_experts(config, layer) if kinds is None or layer >= len(kinds) else kinds[layer] == "sparse"


@dataclass(frozen=True)
class Member:
    """A model_type of config.json, and what follows from it.

    architectures: the first is the released one. scoring: how logits become affinities, a key of routing.SCORING.
    grouping: for each topk_method of config.json how a group of experts is rated, a key of routing.GROUP_RATING, None
    where groups do not count; the first is meant where config.json names none. correction_bias: whether the router has
    the tensor that corrects the load. judge: the class of transformers whose logits are right. has_experts: whether a
    layer (config, index) has experts. defaults: what a field means where config.json lacks it, if not what it means for
    DeepSeek-V3. fixed: fields that have one value only, since the judge has no use for others. norm_after_experts:
    whether layers with experts have post_mlp_layernorm on the experts' output. scaled_queries: whether queries grow
    with their position (llama_4_scaling_beta among the RoPE parameters).
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
    norm_after_experts: bool = False
    scaled_queries: bool = False


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
        Member(
            model_type="glm4_moe_lite",
            architectures=("Glm4MoeLiteForCausalLM",),
            scoring="sigmoid",
            grouping=_TWO_BEST,
            correction_bias=True,
            judge="Glm4MoeLiteForCausalLM",
            has_experts=listed_layers,
            defaults={"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
        ),
        Member(
            model_type="sarvam_mla",
            architectures=("SarvamMLAForCausalLM",),
            scoring="sigmoid",
            grouping=_TWO_BEST,
            correction_bias=True,
            judge="DeepseekV3ForCausalLM",
            defaults={"first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
        ),
        Member(
            model_type="axk1",
            architectures=("AXK1ForCausalLM",),
            scoring="sigmoid",
            grouping=_TWO_BEST,
            correction_bias=False,
            judge="AXK1ForCausalLM",
            has_experts=listed_layers,
            defaults={"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
            norm_after_experts=True,
        ),
        Member(
            model_type="mistral4",
            architectures=("Mistral4ForCausalLM",),
            scoring="softmax",
            grouping=_TWO_BEST,
            correction_bias=False,
            judge="Mistral4ForCausalLM",
            scaled_queries=True,
        ),
    )
}
# Models of text and images whose text_config is a member's: model_type -> architectures. The text model is what runs.
# Mistral's architecture is that of older models too, which vLLM runs itself: it is not taken over.
WRAPPERS = {"kimi_k25": ("KimiK25ForConditionalGeneration",), "mistral3": ()}
MODEL_TYPES = (*FAMILY, *WRAPPERS)
_NAMES = [*(member.architectures for member in FAMILY.values()), *WRAPPERS.values()]
ARCHITECTURES = tuple(dict.fromkeys(name for names in _NAMES for name in names))
# Fields that a wrapper may state for its text model.
_OF_BOTH = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
_OF_BOTH += ("bos_token_id", "eos_token_id", "pad_token_id")
# Relatives that differ by more than config: model_type -> what is (or are) not implemented.
_SPARSE = "sparse attention (its indexer) is"
_NOT_IMPLEMENTED = {
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "glm5_next": _SPARSE,
    "axk2": _SPARSE,
    "mistral_large4": _SPARSE,
    "deepseek_v4": "compressed and hybrid attention is",
    "longcat_flash": "zero experts and two attentions in a layer are",
    "kimi_linear": "linear attention is",
    "kimi_k3": "linear attention is",
}


def member_of(model_type: str) -> Member:
    """The row of a model_type. Raises ConfigError for one that is not supported."""
    if model_type in _NOT_IMPLEMENTED:
        what = _NOT_IMPLEMENTED[model_type]
        raise ConfigError(f"config.json: model_type {model_type!r} is not supported: {what} not implemented")
    if model_type not in FAMILY:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
        )
    return FAMILY[model_type]


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config.json, or of the text model in it where it is a wrapper's. Raises ConfigError."""
    if fields.get("model_type") not in WRAPPERS:
        return fields
    text = fields.get("text_config")
    text = vars(text) if isinstance(text, SimpleNamespace) else text  # NxDI's, of a config of transformers
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json: text_config {text!r} must be a JSON object: the config of the text model")
    shared = {name: fields[name] for name in _OF_BOTH if fields.get(name) is not None}
    return shared | {name: value for name, value in text.items() if value is not None}
