"""NeuronConfig and InferenceConfig as far as the embedded runtime needs them; field names are NxDI's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..saved_config import CONFIG_FILE

# Fields of NxDI that this runtime accepts and has no use for.
_WITHOUT_USE = (
    "on_cpu",
    "cast_type",
    "padding_side",
    "logical_nc_config",
    "save_sharded_checkpoint",
    "disable_numeric_cc_token",
    "quantized_checkpoints_path",
    "quantization_type",
    "quantization_dtype",
    "quantization_scale_dtype",
    "quantization_block_axis",
    "quantization_block_size",
    "modules_to_not_convert",
)


class MoENeuronConfig:
    """How the model runs: lengths, batch sizes, dtype, parallelism, buckets.

    seq_len bounds prompt and generated tokens together, max_context_length the prompt. Buckets are the padded lengths
    that a compiled model would have; without bucketing there is one for prompts and one for decoding.
    """

    # Read by the model, not supported here. Class attributes, so that they are not saved.
    on_device_sampling_config = None
    rpl_reduce_dtype = None
    is_eagle_draft = False

    def __init__(self, **kwargs: Any) -> None:
        self.tp_degree: int = kwargs.pop("tp_degree", 1)
        self.batch_size: int = kwargs.pop("batch_size", 1)
        self.ctx_batch_size: int = kwargs.pop("ctx_batch_size", self.batch_size)
        self.tkg_batch_size: int = kwargs.pop("tkg_batch_size", self.batch_size)
        self.max_batch_size: int = kwargs.pop("max_batch_size", self.batch_size)
        self.kv_cache_batch_size: int = kwargs.pop("kv_cache_batch_size", self.batch_size)
        self.is_continuous_batching: bool = kwargs.pop("is_continuous_batching", False)
        self.seq_len: int = kwargs.pop("seq_len", 128)
        self.max_context_length: int = kwargs.pop("max_context_length", self.seq_len)
        self.max_length: int = kwargs.pop("max_length", self.seq_len)
        self.sequence_parallel_enabled: bool = kwargs.pop("sequence_parallel_enabled", False)
        self.enable_bucketing: bool = kwargs.pop("enable_bucketing", False)
        self.context_encoding_buckets: list[int] | None = kwargs.pop("context_encoding_buckets", None)
        self.token_generation_buckets: list[int] | None = kwargs.pop("token_generation_buckets", None)
        self.is_prefix_caching: bool = kwargs.pop("is_prefix_caching", False)
        self.is_block_kv_layout: bool = kwargs.pop("is_block_kv_layout", False)
        self.pa_num_blocks: int = kwargs.pop("pa_num_blocks", self.batch_size)
        self.pa_block_size: int = kwargs.pop("pa_block_size", self.seq_len)
        self.prefix_buckets: list[int] | None = kwargs.pop("prefix_buckets", None)
        self.overrides_torch_dtype: bool = kwargs.pop("overrides_torch_dtype", "torch_dtype" in kwargs)
        dtype = kwargs.pop("torch_dtype", torch.bfloat16)
        self.torch_dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.quantized: bool = kwargs.pop("quantized", False)
        self.enable_eagle_speculation: bool = kwargs.pop("enable_eagle_speculation", False)
        self.enable_fused_speculation: bool = kwargs.pop("enable_fused_speculation", False)
        self.speculation_length: int = kwargs.pop("speculation_length", 0)
        for name in _WITHOUT_USE:
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        self.blockwise_matmul_config = kwargs.pop("blockwise_matmul_config", {})
        if kwargs:
            raise ConfigError(f"neuron_config: {', '.join(kwargs)}: not known to the embedded runtime; leave it out")
        if self.max_context_length > self.max_length:
            raise ConfigError(
                f"neuron_config: max_context_length {self.max_context_length} exceeds seq_len {self.max_length}"
            )

    def prompt_buckets(self) -> list[int]:
        return self._buckets(self.context_encoding_buckets, self.max_context_length)

    def decode_buckets(self) -> list[int]:
        return self._buckets(self.token_generation_buckets, self.max_length)

    def _buckets(self, buckets: list[int] | None, longest: int) -> list[int]:
        return sorted(buckets) if self.enable_bucketing and buckets else [longest]


class InferenceConfig:
    """The model's config.json fields as attributes, with the NeuronConfig in `neuron_config`."""

    def __init__(
        self,
        neuron_config: MoENeuronConfig,
        load_config: Callable[["InferenceConfig"], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.neuron_config = neuron_config
        if load_config is not None:
            load_config(self)
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.add_derived_config()
        self.validate_config()

    def save(self, folder: str | Path) -> None:
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.__dict__, default=_to_json, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, **kwargs: Any) -> "InferenceConfig":
        return cls.from_json_string((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"), **kwargs)

    @classmethod
    def from_json_string(cls, json_string: str, **kwargs: Any) -> "InferenceConfig":
        """The saved config; kwargs override its fields."""
        fields = json.loads(json_string) | kwargs
        return cls(cls.get_neuron_config_cls()(**fields.pop("neuron_config")), **fields)


def _to_json(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value.__dict__
