"""The seam: where the named surface of NxD and NxDI comes from.

NxDI when `neuronx_distributed_inference` can be imported, else the embedded runtime. The environment variable
NXDI_DEEPSEEK_BACKEND (auto, nxdi, embedded) overrides the choice. No other file imports NxD or NxDI, except the
integrations that exist for them and what lowers NxDI's own model instances (graph_cost/rank_model.py).
"""

import importlib.metadata
import importlib.util
import os

from .errors import ConfigError

BACKEND_VARIABLE = "NXDI_DEEPSEEK_BACKEND"
_NXDI = "neuronx_distributed_inference"


def _choose() -> str:
    choice = os.environ.get(BACKEND_VARIABLE, "auto")
    if choice not in ("auto", "nxdi", "embedded"):
        raise ConfigError(f"{BACKEND_VARIABLE}={choice!r}; use auto, nxdi or embedded")
    installed = importlib.util.find_spec(_NXDI) is not None
    if choice == "nxdi" and not installed:
        raise ConfigError(f"{BACKEND_VARIABLE}=nxdi, but {_NXDI} is not installed; install the Neuron SDK or unset it")
    return "nxdi" if installed and choice != "embedded" else "embedded"


def _nxdi_version() -> str:
    try:
        return importlib.metadata.version(_NXDI)
    except importlib.metadata.PackageNotFoundError:
        return "from source"


NAME = _choose()

if NAME == "nxdi":
    try:
        from .nxdi_backend import (
            ColumnParallelLinear,
            HuggingFaceGenerationAdapter,
            InferenceConfig,
            KVCacheManager,
            MoENeuronConfig,
            NeuronBaseForCausalLM,
            NeuronBaseModel,
            ParallelEmbedding,
            RowParallelLinear,
            build_moe,
            gather_sequence,
            rmsnorm_cls,
        )
    except ImportError as error:
        raise ConfigError(
            f"{_NXDI} {_nxdi_version()} cannot be used ({error}); install the Neuron SDK 2.29 or newer, "
            f"or set {BACKEND_VARIABLE}=embedded"
        ) from error
else:
    from .embedded import (
        ColumnParallelLinear,
        HuggingFaceGenerationAdapter,
        InferenceConfig,
        KVCacheManager,
        MoENeuronConfig,
        NeuronBaseForCausalLM,
        NeuronBaseModel,
        ParallelEmbedding,
        RowParallelLinear,
        build_moe,
        gather_sequence,
        rmsnorm_cls,
    )

__all__ = [
    "BACKEND_VARIABLE",
    "NAME",
    "ColumnParallelLinear",
    "HuggingFaceGenerationAdapter",
    "InferenceConfig",
    "KVCacheManager",
    "MoENeuronConfig",
    "NeuronBaseForCausalLM",
    "NeuronBaseModel",
    "ParallelEmbedding",
    "RowParallelLinear",
    "build_moe",
    "describe",
    "gather_sequence",
    "rmsnorm_cls",
]


def describe() -> str:
    """One line for the user: which backend runs, and why."""
    if NAME == "nxdi":
        return f"backend: NxDI ({_nxdi_version()})"
    reason = f"{BACKEND_VARIABLE}=embedded" if importlib.util.find_spec(_NXDI) else f"{_NXDI} is not installed"
    return f"backend: embedded runtime ({reason})"
