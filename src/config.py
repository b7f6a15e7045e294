"""How the model runs: NxDI's NeuronConfig with what this model needs, and the NxDI config that holds a ModelConfig."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import backend
from .dtypes import BY_TORCH
from .errors import ConfigError
from .model_config import OTHER_FORM_IN_JSON, ModelConfig, load_model_config, read_config_json, read_model_config
from .neuron_values import check_values
from .paged_fields import check_paging, fill_paging, fill_sizes
from .quantized_fields import check_weights, fill_weights
from .saved_config import CONFIG_FILE, check_saved_config, restore_enums
from .shard_fields import check_shards
from .third_party import told

# NeuronConfig fields that the model does not implement: the one value that it accepts, and the remedy.
_UNSUPPORTED = {
    "padding_side": ("right", "pad prompts on the right"),
    "is_chunked_prefill": (
        False,
        "leave chunked_prefill_config unset; with is_prefix_caching and is_block_kv_layout prompts longer than "
        "max_context_length run in chunks of it",
    ),
    "flash_decoding_enabled": (False, "NxDI's does not know latents; kv_seq_shards splits the cache by sequence"),
    "cp_degree": (1, "context parallelism is not implemented"),
    "attention_dp_degree": (1, "attention data parallelism is not implemented"),
    "ep_degree": (1, "use tensor parallelism only"),
    "moe_ep_degree": (1, "use tensor parallelism only"),
    "hybrid_sharding_config": (None, "it holds the experts twice, which does not fit; leave it unset"),
    "pp_degree": (1, "use tensor parallelism only"),
    "is_medusa": (False, "speculation is not implemented"),
    "speculation_length": (0, "speculation is not implemented"),
    "enable_fused_speculation": (False, "speculation is not implemented"),
    "lora_config": (None, "LoRA is not implemented"),
    "kv_quant_config": (None, "the latent cache is not quantized"),
    "kv_cache_quant": (False, "the latent cache is not quantized"),
    "k_cache_transposed": (False, "leave it off"),
    "token_generation_batches": (None, "a step of fewer sequences is filled up to tkg_batch_size; leave it unset"),
    "windowed_context_encoding_size": (None, "leave it unset"),
    "layer_boundary_markers": (False, "leave it off"),
    "attn_block_tkg_nki_kernel_enabled": (False, "NxDI's attention kernels do not cover latent attention"),
    "fused_qkv": (False, "leave it off; the down-projections are always fused"),
    "quantized_mlp_kernel_enabled": (False, "FP8 is for routed experts alone"),
    "activation_quantization_type": (None, "activations are not quantized"),
}
# The expert kernel of prompts. NxD names it for a dynamic loop; in NKI's library 2.29 it unrolls every block.
_EXPERT_KERNEL = {
    "use_shard_on_block_dynamic_while": True,
    "block_sharding_strategy": "PING_PONG",
    "block_size": 128,
    "skip_dma_token": True,
    "skip_dma_weight": True,
}
# Attributes that NxDI reads and config.json may lack, with their defaults.
_ASKED_BY_NXDI = {"hidden_act": "silu", "output_attentions": False, "output_hidden_states": False}


class DeepseekV3NeuronConfig(backend.MoENeuronConfig):
    """NxDI's MoENeuronConfig with the defaults that DeepSeek-V3 needs on trn2.

    The plain blockwise kernel of NxD 2.29 raises NotImplementedError for prompts of 64 tokens and more, so the default
    is the one sharded over blocks. Blocks have 128 rows, the fewest that it takes: each expert may leave one block
    nearly empty. Of those the kernel reads neither the rows that hold no token nor weights that it has already
    (skip_dma_*). Pass `blockwise_matmul_config` to choose otherwise; it is taken as it is given.
    weights: the form of routed experts on a rank, a name of weight_forms.FORMS. NxDI's fields for it are filled in.
    kv_seq_shards: adjacent ranks that share each sequence's cache among them (sharded_attention.py); 1, 4 (a chip), 16
    or all 64 are meant, and 1 is the default: every rank holds all of it.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Without the token that torch_xla threads through all-gathers and reduce-scatters: it would add a
        # multiplication and an addition of everything that is gathered.
        kwargs.setdefault("disable_numeric_cc_token", True)
        kwargs.setdefault("blockwise_matmul_config", dict(_EXPERT_KERNEL))
        kwargs = fill_paging(fill_weights(_from_saved(kwargs)))
        check_values(kwargs)
        _check_expert_kernel(kwargs["blockwise_matmul_config"])
        self.weights: str = kwargs.pop("weights")
        self.kv_seq_shards: int = kwargs.pop("kv_seq_shards", 1)
        with told("neuron_config", AssertionError, TypeError, ValueError):  # how NxDI refuses a value
            super().__init__(**kwargs)
        if self.is_prefix_caching:
            fill_sizes(self, kwargs)


def _check_expert_kernel(choice: Any) -> None:
    """Raises ConfigError for what NKI's kernel asserts against, while the model is compiled."""

    def asks(name: str) -> Any:
        return choice.get(name) if isinstance(choice, Mapping) else getattr(choice, name, None)

    if asks("use_shard_on_intermediate_dynamic_while") and asks("skip_dma_weight"):
        raise ConfigError(
            "neuron_config: blockwise_matmul_config: skip_dma_weight is not supported by the kernel of "
            "use_shard_on_intermediate_dynamic_while; leave it out"
        )


def prompt_lengths(neuron_config: Any) -> list[int]:
    """The padded lengths that prompts have: a graph each."""
    buckets = neuron_config.context_encoding_buckets if neuron_config.enable_bucketing else None
    return list(buckets or [neuron_config.max_context_length])


def _from_saved(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turns what NxDI saved in neuron_config.json back into constructor arguments."""
    kwargs = {name: restore_enums(value) for name, value in kwargs.items()}
    if "normalize_top_k_affinities" in kwargs:
        kwargs["disable_normalize_top_k_affinities"] = not kwargs.pop("normalize_top_k_affinities")
    return kwargs


class DeepseekV3InferenceConfig(backend.InferenceConfig):
    """NxDI's config: the fields of config.json as attributes, checked against what the model implements.

    Build it with `load_config=load_pretrained_config(MODEL_DIR)` (this module's, or NxDI's).
    Raises ConfigError naming the field and the remedy.
    """

    @property
    def model(self) -> ModelConfig:
        """The fields as they are now, checked and typed: what the modules, the layout and the sharder read."""
        return read_model_config(self.__dict__)

    @classmethod
    def load(cls, model_path: str | Path, **kwargs: Any) -> "DeepseekV3InferenceConfig":
        """The config that compile() saved in a folder. Raises ConfigError for a file that is missing or damaged."""
        with told(f"{Path(model_path) / CONFIG_FILE}: cannot be used"):
            return super().load(model_path, **kwargs)

    @classmethod
    def get_neuron_config_cls(cls) -> type[DeepseekV3NeuronConfig]:
        return DeepseekV3NeuronConfig

    @classmethod
    def from_json_string(cls, json_string: str, **kwargs: Any) -> "DeepseekV3InferenceConfig":
        """From the text of a neuron_config.json. Raises ConfigError for one that names classes of other packages."""
        check_saved_config(json_string)
        return super().from_json_string(json_string, **kwargs)

    def add_derived_config(self) -> None:
        """Sets what NxDI reads as attributes: the checked values, and defaults for what the file lacks."""
        self.num_cores_per_group = 1
        model = self.model
        for field in fields(model):
            if field.name not in OTHER_FORM_IN_JSON:
                setattr(self, field.name, getattr(model, field.name))
        for name, value in _ASKED_BY_NXDI.items():
            if getattr(self, name, None) is None:
                setattr(self, name, value)

    def validate_config(self) -> None:
        self.model.check_tensor_parallel(self.neuron_config.tp_degree)
        self._validate_neuron_config()
        check_weights(self.neuron_config, self.model)

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
        if neuron_config.is_block_kv_layout:
            check_paging(neuron_config)
        check_shards(neuron_config)
        self._validate_prompts()
        if neuron_config.enable_bucketing:
            self._validate_buckets("context_encoding_buckets", "max_context_length")
            self._validate_buckets("token_generation_buckets", "max_length")

    def _validate_sequence_parallel(self) -> None:
        neuron_config = self.neuron_config
        tp = neuron_config.tp_degree
        if neuron_config.ctx_batch_size != 1:
            # NxD's MoE joins the router's choices rank by rank; only with one prompt is that the order of the tokens.
            raise ConfigError("neuron_config: sequence_parallel_enabled needs ctx_batch_size 1")
        for length in prompt_lengths(neuron_config):
            if length % tp or length < 2 * tp:
                raise ConfigError(
                    f"neuron_config: sequence_parallel_enabled needs prompts of a multiple of tp_degree {tp} and at "
                    f"least {2 * tp} tokens, not {length}; change max_context_length or context_encoding_buckets"
                )

    def _validate_prompts(self) -> None:
        """NxD's blockwise experts share out the tokens of a prompt; few tokens it gives to its other forms."""
        neuron_config, model = self.neuron_config, self.model
        tp, batch = neuron_config.tp_degree, neuron_config.ctx_batch_size
        for length in prompt_lengths(neuron_config):
            tokens = batch * length
            if tokens % tp and tokens * model.num_experts_per_tok >= model.n_routed_experts:
                raise ConfigError(
                    f"neuron_config: {batch} prompts of {length} are {tokens} tokens, which tp_degree {tp} does not "
                    "divide; change seq_len, max_context_length, context_encoding_buckets or ctx_batch_size"
                )

    def _validate_buckets(self, field: str, longest_field: str) -> None:
        """The largest bucket must hold what the model promises to take, else it fails in the middle of serving."""
        buckets, longest = getattr(self.neuron_config, field), getattr(self.neuron_config, longest_field)
        if buckets and max(buckets) != longest:
            raise ConfigError(
                f"neuron_config: {field} end at {max(buckets)}, {longest_field} is {longest}; add a bucket of {longest}"
            )


def load_pretrained_config(model_dir: str | Path) -> Callable[[DeepseekV3InferenceConfig], None]:
    """A `load_config` hook that reads config.json itself.

    Unlike NxDI's hook it needs no transformers class for the model_type (Kimi-K2 has none) and keeps the file's fields
    as they are. The NeuronConfig takes the file's dtype unless its own torch_dtype was given.
    """

    def load_config(self: DeepseekV3InferenceConfig) -> None:
        dtype = load_model_config(model_dir).dtype
        if dtype is not None and not self.neuron_config.overrides_torch_dtype:
            self.neuron_config.torch_dtype = BY_TORCH[dtype].to_torch()
        found = read_config_json(model_dir)
        self.__dict__.update((name, value) for name, value in found.items() if name not in ("torch_dtype", "dtype"))
        self._name_or_path = str(model_dir)

    return load_config
