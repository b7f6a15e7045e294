"""Enters the model in the tables by which NxDI and the vLLM Neuron plugin find model classes."""

import importlib.metadata
import warnings
from types import ModuleType

from ..errors import ConfigError
from .post_import import when_imported

INFERENCE_DEMO = "neuronx_distributed_inference.inference_demo"
CONSTANTS = "neuronx_distributed_inference.utils.constants"

# What `inference_demo --model-type` calls the model: the model_type of config.json.
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
# What the vLLM plugin looks up: the architecture of config.json up to "For", in lower case.
ARCHITECTURES = ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM")
ARCHITECTURE_KEYS = tuple(name.partition("For")[0].lower() for name in ARCHITECTURES)


def register() -> None:
    """Makes NxDI know the model in this process: `inference_demo.MODEL_TYPES` and `utils.constants.MODEL_TYPES`.

    Imports nothing of NxDI: a table gets its entries as soon as its module is imported. Can be called again, before or
    after NxDI is imported.
    """
    when_imported(INFERENCE_DEMO, lambda module: add_model(module, MODEL_TYPES))
    when_imported(CONSTANTS, lambda module: add_model(module, ARCHITECTURE_KEYS))


def add_model(module: ModuleType, keys: tuple[str, ...]) -> None:
    """Adds the model under `keys` to the MODEL_TYPES of `module`, in place, since others hold the table itself.

    Warns where it cannot: whoever serves another model must not fail for this one.
    """
    table = getattr(module, "MODEL_TYPES", None)
    if not isinstance(table, dict):
        _warn(module, "it has no MODEL_TYPES table any more")
        return
    try:
        from .. import backend
        from ..application import NeuronDeepseekV3ForCausalLM

        if backend.NAME != "nxdi":
            raise ConfigError(f"{backend.BACKEND_VARIABLE}={backend.NAME}; unset it")
        register_config()
    except (ImportError, ConfigError) as error:
        _warn(module, str(error))
        return
    for key in keys:
        table.setdefault(key, {})["causal-lm"] = NeuronDeepseekV3ForCausalLM


def register_config() -> None:
    """Makes transformers read a config.json of Kimi-K2, for which it has no class without remote code."""
    from transformers import AutoConfig, DeepseekV3Config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "kimi_k2" not in CONFIG_MAPPING:
        AutoConfig.register("kimi_k2", type("KimiK2Config", (DeepseekV3Config,), {"model_type": "kimi_k2"}))


def version_of(package: str) -> str:
    """`package version`, for messages."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} (from source)"


def _warn(module: ModuleType, reason: str) -> None:
    package = version_of(module.__name__.partition(".")[0])
    warnings.warn(f"DeepSeek-V3 is not registered in {module.__name__} of {package}: {reason}", stacklevel=3)
