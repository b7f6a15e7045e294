"""Refuses, before vLLM starts its engine, what would fail in the engine: there an error ends the whole server."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# The Neuron plugin's variables: a folder to load compiled models from, and the switch to vLLM's own scheduler.
ARTIFACTS_VARIABLE = "NEURON_COMPILED_ARTIFACTS"
_SCHEDULER_VARIABLE = "DISABLE_NEURON_CUSTOM_SCHEDULER"


@dataclass(frozen=True)
class ServingChecks:
    """What vLLM calls for an architecture while its configuration is made: vLLM's own entry, if it has one, and ours.

    An instance serves where vLLM has classes with static methods.
    """

    vllms_own: Any = None

    def verify_and_update_model_config(self, model_config: Any) -> None:
        """vLLM 0.16 and newer: nothing of ours yet."""
        self._call_vllms_own("verify_and_update_model_config", model_config)

    def verify_and_update_config(self, vllm_config: Any) -> None:
        """Raises ConfigError naming the argument and the remedy. Says nothing about platforms other than Neuron."""
        self._call_vllms_own("verify_and_update_config", vllm_config)
        from vllm.platforms import current_platform

        if type(current_platform).__module__.startswith("vllm_neuron"):
            check_features(vllm_config)
            check_limits(vllm_config)
            from .vllm_memory import check_memory_plan

            check_memory_plan(vllm_config, _limits(vllm_config)[0])

    def _call_vllms_own(self, method: str, config: Any) -> None:
        if hasattr(self.vllms_own, method):
            getattr(self.vllms_own, method)(config)


def check_features(vllm_config: Any) -> None:
    """Raises ConfigError for features of vLLM that the model does not have."""
    unsupported = {
        "enable_prefix_caching without num_gpu_blocks_override": (
            vllm_config.cache_config.enable_prefix_caching and not vllm_config.cache_config.num_gpu_blocks_override,
            "vLLM may use more blocks than the model has; pass --num-gpu-blocks-override with at least max-num-seqs * "
            "max-model-len / block-size, or --no-enable-prefix-caching",
        ),
        "enable_lora": (vllm_config.lora_config, "LoRA is not implemented; leave it off"),
        "speculative_config": (vllm_config.speculative_config, "speculation is not implemented; leave it unset"),
        _SCHEDULER_VARIABLE: (
            os.environ.get(_SCHEDULER_VARIABLE, "0") != "0",
            "it stands for NxDI's chunked prefill, which does not run; unset it, and pass --enable-prefix-caching for "
            "prompts in chunks of max_context_length",
        ),
    }
    for name, (asked, remedy) in unsupported.items():
        if asked:
            raise ConfigError(f"vLLM: {name} is not supported for DeepSeek-V3 on Neuron; {remedy}")


def check_limits(vllm_config: Any) -> None:
    """Raises ConfigError when vLLM would send longer prompts or more sequences than the model is compiled for."""
    limits, where = _limits(vllm_config)
    # In blocks, longer prompts run in chunks.
    prompts = "max_length" if vllm_config.cache_config.enable_prefix_caching else "max_context_length"
    for name, value, field in (
        ("max_model_len", vllm_config.model_config.max_model_len, prompts),
        ("max_model_len", vllm_config.model_config.max_model_len, "seq_len"),
        ("max_num_seqs", vllm_config.scheduler_config.max_num_seqs, "batch_size"),
    ):
        limit = limits.get(field)
        if isinstance(limit, int) and value > limit:
            raise ConfigError(
                f"vLLM: {name} {value} exceeds {field} {limit} of {where}; lower {name}, or raise {field} and "
                "compile again"
            )


def _limits(vllm_config: Any) -> tuple[dict[str, Any], str]:
    """The NeuronConfig fields that are fixed already, and by what."""
    folder = os.environ.get(ARTIFACTS_VARIABLE)
    saved = Path(folder or "", "neuron_config.json")
    if folder and saved.exists():
        return _saved_neuron_config(saved), str(saved)
    overrides = (vllm_config.additional_config or {}).get("override_neuron_config") or {}
    return overrides, "override_neuron_config"


def _saved_neuron_config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["neuron_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error!r}); delete its folder and compile again") from None
