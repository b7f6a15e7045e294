"""Configuration of the DeepSeek-V3 family: Hugging Face's config.json plus NxDI's NeuronConfig."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import backend
from .errors import ConfigError
from .rope_util import YarnScaling

SUPPORTED_MODEL_TYPES = ("deepseek_v3", "kimi_k2")

# NeuronConfig fields that this model does not implement: the only value that works, and what to do about it.
_UNSUPPORTED = {
    "padding_side": ("right", "pad prompts on the right"),
    # These two ahead of the block layout that they bring along.
    "is_prefix_caching": (False, "turn prefix caching off (vLLM: --no-enable-prefix-caching)"),
    "is_chunked_prefill": (False, "turn chunked prefill off; leave chunked_prefill_config unset"),
    "is_block_kv_layout": (False, "the latent cache is not paged; leave it off"),
    "flash_decoding_enabled": (False, "the latent cache is not sharded; leave it off"),
    "cp_degree": (1, "context parallelism is not implemented"),
    "attention_dp_degree": (1, "attention data parallelism is not implemented"),
    "ep_degree": (1, "use tensor parallelism only"),
    "moe_ep_degree": (1, "use tensor parallelism only"),
    "pp_degree": (1, "use tensor parallelism only"),
    "is_medusa": (False, "speculation is not implemented"),
    "speculation_length": (0, "speculation is not implemented"),
    "enable_fused_speculation": (False, "speculation is not implemented"),
    "lora_config": (None, "LoRA is not implemented"),
    "kv_quant_config": (None, "the latent cache is not quantized"),
    "kv_cache_quant": (False, "the latent cache is not quantized"),
    "k_cache_transposed": (False, "leave it off"),
    "windowed_context_encoding_size": (None, "leave it unset"),
    "layer_boundary_markers": (False, "leave it off"),
    "attn_block_tkg_nki_kernel_enabled": (False, "NxDI's attention kernels do not cover latent attention"),
    "fused_qkv": (False, "leave it off; the down-projections are always fused"),
    "quantized": (False, "FP8 checkpoints are dequantized while loading"),
}

# Written by Hugging Face and by the released checkpoints, under either name.
_ROPE_TYPE_KEYS = ("type", "rope_type")
_YARN_KEYS = tuple(YarnScaling.__dataclass_fields__)


class DeepseekV3NeuronConfig(backend.MoENeuronConfig):
    """NxDI's MoENeuronConfig with the defaults that DeepSeek-V3 needs on trn2.

    The blockwise expert matmul defaults to the dynamic-while kernel sharded over blocks: the plain kernel of NxD 2.29
    raises NotImplementedError for prompts of 64 tokens and more. Its blocks have 128 rows, the fewest that NxD's
    kernels take: each expert may leave one block almost empty, so with 256 experts shorter blocks compute fewer rows
    for every prompt up to 8192 tokens. Pass `blockwise_matmul_config` to choose otherwise.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault(
            "blockwise_matmul_config",
            {"use_shard_on_block_dynamic_while": True, "block_sharding_strategy": "PING_PONG", "block_size": 128},
        )
        try:
            super().__init__(**_from_saved(kwargs))
        except AssertionError as error:  # NxDI's way of refusing a value
            raise ConfigError(f"neuron_config: {error}") from error


def _from_saved(fields: dict[str, Any]) -> dict[str, Any]:
    """What NxDI's constructors take, where its neuron_config.json holds something else."""
    fields = {name: _restore_enums(value) for name, value in fields.items()}
    if "normalize_top_k_affinities" in fields:
        fields["disable_normalize_top_k_affinities"] = not fields.pop("normalize_top_k_affinities")
    return fields


def _restore_enums(value: Any) -> Any:
    """NxDI writes an enum's member as the dict of its attributes, and does not read it back."""
    if not isinstance(value, dict):
        return value
    if "_name_" in value:
        owner = value["__objclass__"]
        return getattr(importlib.import_module(owner["__module__"]), owner["__name__"])[value["_name_"]]
    return {name: _restore_enums(item) for name, item in value.items()}


class DeepseekV3InferenceConfig(backend.InferenceConfig):
    """Model config with Hugging Face's field names, checked against what the model implements.

    Build it with `load_config=load_pretrained_config(MODEL_DIR)` (this module's, or NxDI's).
    Raises ConfigError naming the field and the remedy.
    """

    def get_required_attributes(self) -> list[str]:
        return [
            "hidden_size",
            "intermediate_size",
            "kv_lora_rank",
            "moe_intermediate_size",
            "n_routed_experts",
            "num_attention_heads",
            "num_experts_per_tok",
            "num_hidden_layers",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "rms_norm_eps",
            "v_head_dim",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls) -> type[DeepseekV3NeuronConfig]:
        return DeepseekV3NeuronConfig

    def add_derived_config(self) -> None:
        """Fills fields that older config files leave out, with the defaults of the released modeling code."""
        self.num_cores_per_group = 1
        defaults = {
            "attention_bias": False,
            "first_k_dense_replace": 0,
            "hidden_act": "silu",
            "max_position_embeddings": 163840,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_shared_experts": 0,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
            "output_attentions": False,  # asked for by NxDI's forward, as is the next
            "output_hidden_states": False,
            "pad_token_id": 0,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "noaux_tc",
        }
        for name, value in defaults.items():
            if not hasattr(self, name):
                setattr(self, name, value)
        if self.pad_token_id is None:
            self.pad_token_id = 0
        self.n_shared_experts = self.n_shared_experts or 0

    def validate_config(self) -> None:
        missing = [name for name in self.get_required_attributes() if getattr(self, name, None) is None]
        if missing:
            raise ConfigError(f"config.json: missing {', '.join(missing)}; is this a DeepSeek-V3 checkpoint?")
        self._validate_model()
        self._validate_tensor_parallel()
        self._validate_neuron_config()

    def _validate_model(self) -> None:
        expect = {
            "model_type": (getattr(self, "model_type", "deepseek_v3"), SUPPORTED_MODEL_TYPES),
            "topk_method": (self.topk_method, ("noaux_tc",)),
            "scoring_func": (self.scoring_func, ("sigmoid",)),
            "hidden_act": (self.hidden_act, ("silu",)),
        }
        for field, (value, allowed) in expect.items():
            if value not in allowed:
                raise ConfigError(f"config.json: {field} {value!r} is not supported; supported: {', '.join(allowed)}")
        if self.n_routed_experts % self.n_group:
            raise ConfigError(f"config.json: n_group {self.n_group} does not divide {self.n_routed_experts} experts")
        per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and per_group < 2:
            raise ConfigError(f"config.json: n_group {self.n_group} leaves one expert per group; 2 are needed")
        if not 0 < self.topk_group <= self.n_group:
            raise ConfigError(f"config.json: topk_group {self.topk_group} is not in 1..n_group {self.n_group}")
        eligible = self.topk_group * per_group
        if not 0 < self.num_experts_per_tok <= eligible:
            raise ConfigError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} is not in 1..{eligible}, the experts "
                "that topk_group leaves to choose from"
            )
        self.rope_theta_and_scaling()

    def _validate_tensor_parallel(self) -> None:
        tp = self.neuron_config.tp_degree
        sizes = {
            "num_attention_heads": self.num_attention_heads,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "vocab_size": self.vocab_size,
            "q_lora_rank + kv_lora_rank + qk_rope_head_dim": self.latent_size,
        }
        bad = [f"{name} {size}" for name, size in sizes.items() if size % tp]
        if bad:
            raise ConfigError(f"tp_degree {tp} does not divide {', '.join(bad)}; choose a tp_degree that does")

    def _validate_neuron_config(self) -> None:
        neuron_config = self.neuron_config
        for field, (works, remedy) in _UNSUPPORTED.items():
            value = getattr(neuron_config, field, works)
            if value != works and (value or works):
                raise ConfigError(f"neuron_config: {field}={value!r} is not supported; {remedy}")
        for field in ("kv_cache_batch_size", "max_batch_size"):
            value, slots = getattr(neuron_config, field), neuron_config.tkg_batch_size
            if value != slots:
                raise ConfigError(f"neuron_config: {field} {value} is not tkg_batch_size {slots}; make them equal")
        if getattr(neuron_config, "output_logits", False) and not neuron_config.on_device_sampling_config:
            raise ConfigError("neuron_config: output_logits needs on_device_sampling_config; logits come without it")
        if neuron_config.sequence_parallel_enabled:
            self._validate_sequence_parallel()
        if neuron_config.enable_bucketing:
            self._validate_buckets("context_encoding_buckets", "max_context_length")
            self._validate_buckets("token_generation_buckets", "max_length")

    def _validate_sequence_parallel(self) -> None:
        neuron_config = self.neuron_config
        tp = neuron_config.tp_degree
        if neuron_config.ctx_batch_size != 1:
            # NxD's MoE gathers the router's choices rank by rank, which is the order of the tokens for one prompt only.
            raise ConfigError("neuron_config: sequence_parallel_enabled needs ctx_batch_size 1")
        lengths = neuron_config.context_encoding_buckets if neuron_config.enable_bucketing else None
        for length in lengths or [neuron_config.max_context_length]:
            if length % tp or length < 2 * tp:
                raise ConfigError(
                    f"neuron_config: sequence_parallel_enabled needs prompts of a multiple of tp_degree {tp} and at "
                    f"least {2 * tp} tokens, not {length}; change max_context_length or context_encoding_buckets"
                )

    def _validate_buckets(self, field: str, longest_field: str) -> None:
        """The largest bucket must hold what the model promises to take, else it fails in the middle of serving."""
        buckets, longest = getattr(self.neuron_config, field), getattr(self.neuron_config, longest_field)
        if buckets and max(buckets) != longest:
            raise ConfigError(
                f"neuron_config: {field} end at {max(buckets)}, {longest_field} is {longest}; add a bucket of {longest}"
            )

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def latent_size(self) -> int:
        """Rows of the fused down-projection: query latent (if any), key/value latent, rotary key."""
        return (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        _, scaling = self.rope_theta_and_scaling()
        return scale if scaling is None else scale * scaling.softmax_factor

    def rope_theta_and_scaling(self) -> tuple[float, YarnScaling | None]:
        """Reads `rope_theta` and `rope_scaling`, or the `rope_parameters` that transformers 5 makes of the two."""
        fields = dict(getattr(self, "rope_parameters", None) or getattr(self, "rope_scaling", None) or {})
        theta = float(fields.pop("rope_theta", None) or getattr(self, "rope_theta", 10000.0))
        kinds = {fields.pop(key) for key in _ROPE_TYPE_KEYS if key in fields}
        if kinds - {"yarn", "default", None}:
            raise ConfigError(f"config.json: rope_scaling type {kinds} is not supported; supported: yarn")
        if "yarn" not in kinds or fields.get("factor") is None:
            return theta, None
        unknown = [key for key in fields if key not in _YARN_KEYS and fields[key] is not None]
        if unknown:
            raise ConfigError(f"config.json: rope_scaling has unsupported fields {', '.join(unknown)}; remove them")
        fields = {key: value for key, value in fields.items() if value is not None}
        fields.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        return theta, YarnScaling(**{key: fields[key] for key in _YARN_KEYS if key in fields})


def read_config_json(model_dir: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises ConfigError when it is missing or not a JSON object."""
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the folder of a Hugging Face checkpoint") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds no JSON object; download it again")
    return config


def load_pretrained_config(model_dir: str | Path) -> Callable[[DeepseekV3InferenceConfig], None]:
    """A `load_config` hook that reads config.json itself.

    Unlike NxDI's hook it needs no transformers class for the model_type (Kimi-K2 has none) and keeps the file's fields
    as they are. The NeuronConfig takes the file's dtype unless its own torch_dtype was given.
    """

    def load_config(self: DeepseekV3InferenceConfig) -> None:
        fields = read_config_json(model_dir)
        dtype = fields.pop("torch_dtype", None) or fields.pop("dtype", None)
        if dtype is not None and not self.neuron_config.overrides_torch_dtype:
            self.neuron_config.torch_dtype = getattr(torch, str(dtype).removeprefix("torch."))
        self.__dict__.update(fields)
        self._name_or_path = str(model_dir)

    return load_config
