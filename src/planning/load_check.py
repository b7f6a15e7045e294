"""Refuses, before anything is compiled, what a logical core cannot hold. For compile() and vLLM, on Neuron only.

The instance is the machine's own where the table knows it. NXDI_DEEPSEEK_INSTANCE names another, such as the one that a
machine without devices compiles for, or `any`, with which nothing is refused: a plan is arithmetic, no measurement.
"""

import os
from pathlib import Path
from typing import Any

from ..dtypes import dtype_name
from ..model_config import ModelConfig
from ..weight_forms import BF16, weight_form
from .fitting import check_fits
from .instances import DEFAULT_LNC, INSTANCES, Instance, instance_of
from .rank_memory import CompiledShape

INSTANCE_VARIABLE = "NXDI_DEEPSEEK_INSTANCE"
_ANY = "any"
_PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # on EC2 the instance type


def check_loads(model: ModelConfig, neuron_config: Any) -> None:
    """Raises ConfigError naming the nearest shape that loads. neuron_config: NxDI's, or an object with its fields."""
    instance = instance_here()
    if instance:
        check_fits(model, compiled_shape(neuron_config), instance)


def compiled_shape(neuron_config: Any) -> CompiledShape:
    """What a NeuronConfig compiles for."""
    return CompiledShape(
        tp_degree=neuron_config.tp_degree,
        batch_size=neuron_config.tkg_batch_size,
        seq_len=neuron_config.max_length,
        max_context_length=neuron_config.max_context_length,
        ctx_batch_size=neuron_config.ctx_batch_size,
        form=weight_form(getattr(neuron_config, "weights", BF16.name)),
        dtype=dtype_name(neuron_config.torch_dtype),
        lnc=neuron_config.logical_nc_config or DEFAULT_LNC,
        **_blocks(neuron_config),
        kv_seq_shards=getattr(neuron_config, "kv_seq_shards", 1),
        speculation_length=getattr(neuron_config, "speculation_length", 0),
    )


def _blocks(neuron_config: Any) -> dict[str, int]:
    names = ("pa_block_size", "pa_num_blocks")
    is_paged = getattr(neuron_config, "is_block_kv_layout", False)
    return {name: getattr(neuron_config, name) for name in names} if is_paged else {}


def instance_here() -> Instance | None:
    """The instance to plan for, None where it is not known. Raises ConfigError for an unknown name in the variable."""
    named = os.environ.get(INSTANCE_VARIABLE)
    if named:
        return None if named == _ANY else instance_of(named)
    try:
        return INSTANCES.get(_PRODUCT.read_text().strip())
    except OSError:
        return None
