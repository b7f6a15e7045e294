"""The seam: where the named surface of NxD and NxDI comes from.

NxDI when `neuronx_distributed_inference` can be imported, else the embedded runtime. The environment variable
NXDI_DEEPSEEK_BACKEND (auto, nxdi, embedded) overrides the choice. No other file imports NxD or NxDI, except the
integrations that exist for them and what lowers NxDI's own model instances (graph_cost/rank_model.py).
"""

import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType

from .errors import ConfigError
from .third_party import started_by_torchrun

BACKEND_VARIABLE = "NXDI_DEEPSEEK_BACKEND"
_NXDI = "neuronx_distributed_inference"


def _choose() -> str:
    choice = os.environ.get(BACKEND_VARIABLE, "auto")
    if choice not in ("auto", "nxdi", "embedded"):
        raise ConfigError(f"{BACKEND_VARIABLE}={choice!r}; use auto, nxdi or embedded")
    installed = importlib.util.find_spec(_NXDI) is not None
    if choice == "nxdi" and not installed:
        raise ConfigError(
            f"{BACKEND_VARIABLE}=nxdi, but {_NXDI} is not installed; install the Neuron SDK, put "
            "`nxdi-deepseek without-sdk` before the command to use its source on the CPU, or unset it"
        )
    return "nxdi" if installed and choice != "embedded" else "embedded"


def _nxdi_version() -> str:
    try:
        return importlib.metadata.version(_NXDI)
    except importlib.metadata.PackageNotFoundError:
        return "from source"


NAME = _choose()


def _surface() -> ModuleType:
    if NAME == "nxdi":
        started_by_torchrun()  # NxD reads it while it is imported
    try:
        return importlib.import_module(".nxdi_backend" if NAME == "nxdi" else ".embedded", __package__)
    except ImportError as error:
        if NAME != "nxdi":
            raise
        raise ConfigError(
            f"{_NXDI} {_nxdi_version()} cannot be used ({error}); install the Neuron SDK 2.29 or newer, "
            f"or set {BACKEND_VARIABLE}=embedded"
        ) from error


_names = _surface()
BlockKVCacheManager = _names.BlockKVCacheManager
ColumnParallelLinear = _names.ColumnParallelLinear
HuggingFaceGenerationAdapter = _names.HuggingFaceGenerationAdapter
InferenceConfig = _names.InferenceConfig
KVCacheManager = _names.KVCacheManager
MoENeuronConfig = _names.MoENeuronConfig
NeuronBaseForCausalLM = _names.NeuronBaseForCausalLM
NeuronBaseModel = _names.NeuronBaseModel
ParallelEmbedding = _names.ParallelEmbedding
RowParallelLinear = _names.RowParallelLinear
build_moe = _names.build_moe
gather_columns = _names.gather_columns
gather_sequence = _names.gather_sequence
rank_of = _names.rank_of
rmsnorm_cls = _names.rmsnorm_cls
shard_group = _names.shard_group
with_draft = _names.with_draft


def describe() -> str:
    """One line for the user: which backend runs, and why."""
    if NAME == "nxdi":
        return f"backend: NxDI ({_nxdi_version()})"
    reason = f"{BACKEND_VARIABLE}=embedded" if importlib.util.find_spec(_NXDI) else f"{_NXDI} is not installed"
    return f"backend: embedded runtime ({reason})"
