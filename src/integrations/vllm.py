"""What vLLM calls through its plugin entry points, in each of its processes. Imports nothing heavy by itself."""

import glob
import importlib.util
import os
import warnings

from .post_import import when_imported
from .registration import ARCHITECTURE_KEYS, ARCHITECTURES, add_model, register_config, version_of
from .vllm_config import DeepseekV3ServingConfig

CPU_VARIABLE = "NXDI_DEEPSEEK_VLLM_CPU"
_PLUGIN = "vllm_neuron"
_LOADER = "vllm_neuron.worker.neuronx_distributed_model_loader"
_PLATFORM = "vllm_neuron.platform.NeuronPlatform"


def register_model() -> None:
    """`vllm.general_plugins`: enters the model where vLLM and its Neuron plugin look for it.

    Does nothing without the Neuron plugin. The plugin's table gets its entry when a worker imports it: importing NxDI
    here would slow down every process of vLLM, and most never use it.
    """
    if not _is_installed(_PLUGIN):
        return
    register_config()
    _register_architectures()
    if _is_installed(_LOADER):
        when_imported(_LOADER, lambda loader: add_model(loader, ARCHITECTURE_KEYS))
    else:
        warnings.warn(
            f"DeepSeek-V3 is not registered: {version_of(_PLUGIN)} has no {_LOADER}; use a version that runs models "
            "through NxDI",
            stacklevel=2,
        )


def cpu_platform() -> str | None:
    """`vllm.platform_plugins`: the Neuron plugin's platform on a machine without devices, where it declines itself.

    Only when NXDI_DEEPSEEK_VLLM_CPU=1 asks for it; where devices exist the plugin's own entry is active.
    """
    if os.environ.get(CPU_VARIABLE) != "1" or glob.glob("/dev/neuron*"):
        return None
    if not _is_installed(_PLUGIN):
        warnings.warn(f"{CPU_VARIABLE}=1 has no effect: {_PLUGIN} is not installed", stacklevel=2)
        return None
    return _PLATFORM


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package on the way to it is missing
        return False


def _register_architectures() -> None:
    """vLLM refuses architectures that it does not know, before it asks the plugin; the class it names never runs."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        if architecture not in known:
            ModelRegistry.register_model(architecture, "vllm.model_executor.models.deepseek_v2:DeepseekV3ForCausalLM")
    _register_checks()


def _register_checks() -> None:
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError:  # moved: the same mistakes come to light later, in the engine
        return
    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(architecture, DeepseekV3ServingConfig)
