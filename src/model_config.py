"""config.json as a frozen, typed value, checked once.

Knows neither transformers nor a backend: everything that is done to a checkpoint on any machine starts here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .config_fields import CONFIG_JSON, ConfigFields
from .dtypes import BY_TORCH
from .errors import ConfigError
from .family import MODEL_TYPES, Member, listed_layers, member_of, text_fields

# Fields of ModelConfig whose form differs from config.json's; none of them changes what tensors the model has.
OTHER_FORM_IN_JSON = ("rope_theta", "rope_scaling", "quantization", "dtype", "eos_token_id")

# Fields that change the maths, with the values that are implemented. null counts as absent.
_IMPLEMENTED = {
    "hidden_act": ("silu",),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1, 1.0),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
}
# The same inside rope_scaling: other YaRN variants.
_IMPLEMENTED_ROPE = {"truncate": (True,), "partial_rotary_factor": (1, 1.0), "attention_factor": ()}
_YARN_TYPES = ("yarn", "deepseek_yarn")
_ROPE_TYPE_KEYS = ("rope_type", "type")


@dataclass(frozen=True)
class YarnScaling:
    """The `rope_scaling` field of config.json, with the defaults of the released modeling code."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    llama_4_scaling_beta: float | None = None

    @property
    def attention_factor(self) -> float:
        """Multiplier of cos and sin: mscale(factor, mscale) / mscale(factor, mscale_all_dim)."""
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Multiplier of the softmax scale: mscale(factor, mscale_all_dim)^2."""
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 where nothing is scaled (factor <= 1 or mscale 0)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class Quantization:
    """What config.json says of the storage of weights (`quantization_config`); the tensors decide.

    method: `quant_method`. block_size: `weight_block_size`, rows and columns that share a scale, None where not given.
    format: `format` or `quant_algo`, what tools that know several formats call this one.
    """

    method: str
    block_size: tuple[int, int] | None = None
    format: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that the model depends on, under their Hugging Face names, with both spellings of
    transformers 4 and 5 made one. Made by `read_model_config`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    q_lora_rank: int | None
    n_shared_experts: int
    n_group: int
    topk_group: int
    topk_method: str
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int
    moe_layer_freq: int
    mlp_layer_types: tuple[str, ...] | None
    attention_bias: bool
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    rope_theta: float
    rope_scaling: YarnScaling | None
    quantization: Quantization | None
    dtype: str | None
    pad_token_id: int
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]

    @cached_property
    def member(self) -> Member:
        return member_of(self.model_type)

    def has_experts(self, layer: int) -> bool:
        return self.member.has_experts(self, layer)

    def has_norm_after_mlp(self, layer: int) -> bool:
        return self.member.norm_after_experts and self.has_experts(layer)

    @property
    def grouping(self) -> str | None:
        """How a group of experts is rated, a key of routing.GROUP_RATING; None where groups do not count."""
        return self.member.grouping[self.topk_method]

    @property
    def mtp_layers(self) -> range:
        """The multi-token prediction layers follow the model's own in the checkpoint."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    @property
    def latent_size(self) -> int:
        """Rows of the fused down-projection: query latent (if any), key/value latent, rotary key."""
        return (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return scale if self.rope_scaling is None else scale * self.rope_scaling.softmax_factor

    def padded_heads(self, tp_degree: int) -> int:
        """The attention heads of all ranks together: as many on each, so that the last may be zeros."""
        return -(-self.num_attention_heads // tp_degree) * tp_degree

    def check_tensor_parallel(self, tp_degree: int) -> None:
        """Raises ConfigError naming the fields that `tp_degree` ranks cannot share. Heads are padded."""
        if tp_degree < 1:
            raise ConfigError(f"tp_degree {tp_degree} must be at least 1")
        sizes = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "vocab_size": self.vocab_size,
            "q_lora_rank + kv_lora_rank + qk_rope_head_dim": self.latent_size,
        }
        bad = [f"{name} {size}" for name, size in sizes.items() if size % tp_degree]
        if bad:
            raise ConfigError(f"tp_degree {tp_degree} does not divide {', '.join(bad)}; choose a tp_degree that does")


def load_model_config(model_dir: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. Raises ConfigError naming the field and the remedy."""
    return read_model_config(read_config_json(model_dir))


def read_config_json(model_dir: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, of its text model where it holds several.

    Raises ConfigError when it is missing or not a JSON object.
    """
    return read_config_file(Path(model_dir) / CONFIG_JSON)


def read_config_file(path: Path) -> dict[str, Any]:
    """The same for the file itself."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds no JSON object; download it again")
    return dict(text_fields(config))


def read_model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Reads and checks the fields of a config.json, which may hold others too.

    null counts as absence; absent fields get the defaults of the released modeling code. Raises ConfigError naming the
    field: for a missing or malformed one, for a value that is not implemented, for sizes that do not fit together.
    """
    fields = text_fields(fields)
    member = member_of(_model_type(ConfigFields(fields)))
    read = ConfigFields(fields, defaults=member.defaults)
    read.implemented(_IMPLEMENTED | {name: (value,) for name, value in member.fixed.items()})
    read.implemented({"scoring_func": (member.scoring,), "topk_method": tuple(member.grouping)})
    topk_method = read.get("topk_method", next(iter(member.grouping)))
    grouped = member.grouping[topk_method] is not None
    max_positions = read.integer("max_position_embeddings", 163840)
    rope_theta, rope_scaling = _rope(read, max_positions, member)
    config = ModelConfig(
        model_type=member.model_type,
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        num_hidden_layers=read.integer("num_hidden_layers", most=1000),
        num_attention_heads=read.integer("num_attention_heads"),
        intermediate_size=read.integer("intermediate_size"),
        moe_intermediate_size=read.integer("moe_intermediate_size"),
        n_routed_experts=read.integer("n_routed_experts", most=4096),
        num_experts_per_tok=read.integer("num_experts_per_tok"),
        kv_lora_rank=read.integer("kv_lora_rank"),
        qk_nope_head_dim=read.integer("qk_nope_head_dim"),
        qk_rope_head_dim=read.integer("qk_rope_head_dim"),
        v_head_dim=read.integer("v_head_dim"),
        rms_norm_eps=read.number("rms_norm_eps"),
        max_position_embeddings=max_positions,
        q_lora_rank=read.integer("q_lora_rank", None),
        n_shared_experts=read.integer("n_shared_experts", 0, least=0),
        n_group=read.integer("n_group", 1) if grouped else 1,
        topk_group=read.integer("topk_group", 1) if grouped else 1,
        topk_method=topk_method,
        routed_scaling_factor=read.number("routed_scaling_factor", 1.0),
        norm_topk_prob=read.flag("norm_topk_prob", True),
        first_k_dense_replace=read.integer("first_k_dense_replace", 0, least=0),
        moe_layer_freq=read.integer("moe_layer_freq", 1),
        mlp_layer_types=_layer_types(read) if member.has_experts is listed_layers else None,
        attention_bias=read.flag("attention_bias", False),
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        num_nextn_predict_layers=read.integer("num_nextn_predict_layers", 0, least=0, most=100),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        quantization=_quantization(read),
        dtype=_dtype(read),
        pad_token_id=read.integer("pad_token_id", 0, least=0),
        bos_token_id=read.integer("bos_token_id", None, least=0),
        eos_token_id=_stop_tokens(read),
    )
    read.raise_problems()
    _check_sizes(config)
    return config


def _model_type(read: ConfigFields) -> str:
    model_type = read.get("model_type", "deepseek_v3")
    if not isinstance(model_type, str):
        raise read.error("model_type", model_type, f"must be text; supported: {', '.join(MODEL_TYPES)}")
    return model_type


def _layer_types(read: ConfigFields) -> tuple[str, ...] | None:
    """`mlp_layer_types`: dense or sparse for each layer, MTP layers may be left out."""
    kinds = read.get("mlp_layer_types", None)
    if kinds is None:
        return None
    layers = read.integer("num_hidden_layers", most=1000)
    if not isinstance(kinds, list | tuple) or not {"dense", "sparse"}.issuperset(map(str, kinds)):
        raise read.error("mlp_layer_types", kinds, "must be a list of 'dense' and 'sparse'")
    if isinstance(layers, int) and len(kinds) < layers:
        raise read.error("mlp_layer_types", kinds, f"must name all {layers} layers")
    return tuple(kinds)


def _rope(read: ConfigFields, max_positions: int, member: Member) -> tuple[float, YarnScaling | None]:
    """`rope_theta` and `rope_scaling`, or the `rope_parameters` that transformers 5 makes of the two."""
    name = "rope_parameters" if read.get("rope_parameters", None) else "rope_scaling"
    found = read.get(name, {}) or {}
    if not isinstance(found, Mapping):
        raise read.error(name, found, "must be a JSON object or null")
    rope = ConfigFields(found, f"{CONFIG_JSON}: {name}")
    theta = rope.number("rope_theta", None, least=1.01) or read.number("rope_theta", 10000.0, least=1.01)
    kinds = {str(found[key]) for key in _ROPE_TYPE_KEYS if found.get(key) is not None}
    settings = {key for key, value in found.items() if value is not None} - {"rope_theta", *_ROPE_TYPE_KEYS}
    if not member.scaled_queries and (kinds == {"default"} or not (kinds or settings)):
        return theta, None
    if not kinds or not kinds.issubset(_YARN_TYPES):
        named = ", ".join(sorted(kinds)) or "missing"
        raise ConfigError(f"{CONFIG_JSON}: {name}: type is {named}; supported: yarn, or default for plain RoPE")
    known = set(_IMPLEMENTED_ROPE) | set(YarnScaling.__dataclass_fields__)
    if member.scaled_queries:
        # Its rotary share is of the whole head, and it repeats a field from outside.
        rope.implemented({**_IMPLEMENTED_ROPE, "partial_rotary_factor": (_rotary_share(read),)})
        known.add("max_position_embeddings")
    else:
        rope.implemented(_IMPLEMENTED_ROPE | {"llama_4_scaling_beta": ()})
    unknown = sorted(settings - known)
    if unknown:
        raise ConfigError(f"{CONFIG_JSON}: {name} has unsupported fields {', '.join(unknown)}; remove them")
    scaling = _yarn(rope, max_positions, member)
    rope.raise_problems()
    return theta, scaling


def _rotary_share(read: ConfigFields) -> float:
    rotated, rest = (read.integer(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim"))
    return rotated / (rotated + rest)


def _yarn(rope: ConfigFields, max_positions: int, member: Member) -> YarnScaling:
    pair = ("mscale", "mscale_all_dim")
    if len({rope.get(name, None) is None for name in pair}) == 2:
        # The released code and transformers scale cos and sin differently then.
        raise ConfigError(f"{CONFIG_JSON}: rope_scaling has one of {' and '.join(pair)}; give both, or neither")
    return YarnScaling(
        factor=rope.number("factor", least=1.0),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
        beta_fast=rope.number("beta_fast", YarnScaling.beta_fast),
        beta_slow=rope.number("beta_slow", YarnScaling.beta_slow),
        mscale=rope.number("mscale", YarnScaling.mscale),
        mscale_all_dim=rope.number("mscale_all_dim", YarnScaling.mscale_all_dim),
        llama_4_scaling_beta=rope.number("llama_4_scaling_beta") if member.scaled_queries else None,
    )


def _quantization(read: ConfigFields) -> Quantization | None:
    found = read.get("quantization_config", {}) or {}
    if not isinstance(found, Mapping):
        raise read.error("quantization_config", found, "must be a JSON object or null")
    if not found:
        return None
    size = found.get("weight_block_size") or _block_structure(found)
    if size is not None:
        if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise ConfigError(f"{CONFIG_JSON}: weight_block_size {size!r} must be two positive integers")
        size = tuple(size)
    kind = found.get("format") or found.get("quant_algo")
    return Quantization(str(found.get("quant_method") or "fp8"), size, None if kind is None else str(kind))


def _block_structure(found: Mapping[str, Any]) -> Any:
    """What compressed-tensors calls weight_block_size, of the first group that has it."""
    groups = found.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("block_structure"):
            return weights["block_structure"]
    return None


def _stop_tokens(read: ConfigFields) -> tuple[int, ...]:
    """`eos_token_id`: none, one or a list."""
    value = read.get("eos_token_id", [])
    tokens = value if isinstance(value, list | tuple) else [value]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise read.error("eos_token_id", value, "must be a token id or a list of them")
    return tuple(tokens)


def _dtype(read: ConfigFields) -> str | None:
    """The dtype of the weights as config.json has it; None where it says nothing, or `auto`."""
    value = read.get("dtype", None) or read.get("torch_dtype", "auto")
    name = str(value).removeprefix("torch.")
    if name == "auto":
        return None
    if name not in BY_TORCH:
        raise read.error("torch_dtype", value, "is no dtype; use bfloat16, float16 or float32")
    return name


def _check_sizes(config: ModelConfig) -> None:
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"{CONFIG_JSON}: qk_rope_head_dim {config.qk_rope_head_dim} must be even: RoPE rotates pairs")
    if config.pad_token_id >= config.vocab_size:
        raise ConfigError(
            f"{CONFIG_JSON}: pad_token_id {config.pad_token_id} is outside the vocabulary of {config.vocab_size}"
        )
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups:
        raise ConfigError(f"{CONFIG_JSON}: n_group {groups} does not divide {experts} experts")
    if groups > 1 and config.grouping == "two best" and experts // groups < 2:
        raise ConfigError(f"{CONFIG_JSON}: n_group {groups} leaves one expert per group; 2 are needed")
    if config.topk_group > groups:
        raise ConfigError(f"{CONFIG_JSON}: topk_group {config.topk_group} is not in 1..n_group {groups}")
    eligible = config.topk_group * experts // groups
    if config.num_experts_per_tok > eligible:
        raise ConfigError(
            f"{CONFIG_JSON}: num_experts_per_tok {config.num_experts_per_tok} is not in 1..{eligible}, the experts "
            "that topk_group leaves to choose from"
        )
