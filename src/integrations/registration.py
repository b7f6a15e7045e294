"""Enters the model in the tables by which NxDI and the vLLM Neuron plugin find model classes."""

from collections.abc import Iterable
from types import ModuleType

from ..errors import ConfigError
from ..family import ARCHITECTURES, MODEL_TYPES
from .post_import import when_imported
from .warn import warning_instead_of_error

INFERENCE_DEMO = "neuronx_distributed_inference.inference_demo"
CONSTANTS = "neuronx_distributed_inference.utils.constants"


def register() -> None:
    """Makes NxDI know the model in this process: `inference_demo.MODEL_TYPES` and `utils.constants.MODEL_TYPES`.

    Imports nothing of NxDI: a table gets its entries as soon as its module is imported. Can be called again, before or
    after NxDI is imported. Where it fails it warns.
    """
    when_imported(INFERENCE_DEMO, add_by_model_type)
    when_imported(CONSTANTS, add_by_architecture)


def add_by_model_type(module: ModuleType) -> None:
    """For `inference_demo --model-type`, which takes the model_type of config.json."""
    _add_model(module, MODEL_TYPES)


def add_by_architecture(module: ModuleType) -> None:
    """For the vLLM plugin, which looks up the architecture of config.json up to "For", in lower case."""
    _add_model(module, [name.partition("For")[0].lower() for name in ARCHITECTURES])


def _add_model(module: ModuleType, keys: Iterable[str]) -> None:
    """Adds the model to the MODEL_TYPES of `module`, in place, since others hold the table itself."""
    with warning_instead_of_error(module.__name__.partition(".")[0]):
        table = getattr(module, "MODEL_TYPES", None)
        if not isinstance(table, dict):
            raise ConfigError(f"{module.__name__} has no MODEL_TYPES table any more")
        causal_lm = _causal_lm()
        for key in keys:
            table.setdefault(key, {})["causal-lm"] = causal_lm


def _causal_lm() -> type:
    """The model's class, on NxDI, and its config in transformers."""
    from .. import backend
    from ..application import NeuronDeepseekV3ForCausalLM
    from .transformers_configs import register_configs

    if backend.NAME != "nxdi":
        raise ConfigError(f"{backend.BACKEND_VARIABLE}={backend.NAME}; unset it")
    register_configs()
    return NeuronDeepseekV3ForCausalLM
