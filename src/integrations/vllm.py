"""What vLLM calls through its plugin entry points, in each of its processes. Imports nothing heavy by itself."""

import glob
import importlib.util
import os
import warnings

from ..errors import ConfigError
from ..family import ARCHITECTURES
from .post_import import when_imported
from .registration import add_by_architecture
from .vllm_config import ServingChecks
from .warn import warning_instead_of_error

CPU_VARIABLE = "NXDI_DEEPSEEK_VLLM_CPU"
_PLUGIN = "vllm_neuron"
_LOADER = "vllm_neuron.worker.neuronx_distributed_model_loader"
_PLATFORM = "vllm_neuron.platform"


def register_model() -> None:
    """`vllm.general_plugins`: enters the model where vLLM and its Neuron plugin look for it.

    Does nothing without the Neuron plugin, and warns where the plugin does not run models through NxDI. The plugin's
    table gets its entry when a worker imports it: importing NxDI here would slow down every process of vLLM, and most
    never use it.
    """
    with warning_instead_of_error(_PLUGIN):
        if not is_installed(_PLUGIN):
            return
        if not is_installed(_LOADER):
            raise ConfigError(f"it has no {_LOADER}; use a version that runs models through NxDI")
        from .transformers_configs import register_configs

        register_configs()
        _register_architectures()
        _register_checks()
        when_imported(_LOADER, add_by_architecture)


def cpu_platform() -> str | None:
    """`vllm.platform_plugins`: the Neuron plugin's platform on a machine without devices, where it declines itself.

    Only when NXDI_DEEPSEEK_VLLM_CPU=1 asks for it; where devices exist the plugin's own entry is active.
    """
    if os.environ.get(CPU_VARIABLE) != "1" or glob.glob("/dev/neuron*"):
        return None
    with warning_instead_of_error(_PLUGIN):
        if is_installed(_PLATFORM):
            return f"{_PLATFORM}.NeuronPlatform"
        warnings.warn(f"{CPU_VARIABLE}=1 has no effect: {_PLATFORM} is not installed", stacklevel=2)
    return None


def is_installed(module: str) -> bool:
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


def _register_checks() -> None:
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError:  # moved: the same mistakes come to light later, in the engine
        return
    for architecture in ARCHITECTURES:
        entry = MODELS_CONFIG_MAP.get(architecture)
        if not isinstance(entry, ServingChecks):
            MODELS_CONFIG_MAP[architecture] = ServingChecks(entry)
