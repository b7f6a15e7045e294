"""Refuses, before vLLM starts its engine, what a logical core could not hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..dtypes import dtype_name
from ..model_config import CONFIG_JSON, load_model_config
from ..planning.fitting import check_fits
from ..planning.instances import DEFAULT_LNC
from ..planning.load_check import instance_here
from ..planning.rank_memory import CompiledShape
from ..weight_forms import BF16, weight_form


def check_memory_plan(vllm_config: Any, fixed: Mapping[str, Any]) -> None:
    """Raises ConfigError naming what does load. fixed: NeuronConfig fields that are decided, by overrides or by a
    compiled folder; the plugin takes the others from vLLM.

    A model that is not in a folder, one that runs on the CPU and an instance that is not known are left alone.
    """
    model_config, instance = vllm_config.model_config, instance_here()
    if instance is None or fixed.get("on_cpu") or not Path(model_config.model, CONFIG_JSON).is_file():
        return
    shape = CompiledShape(
        tp_degree=vllm_config.parallel_config.tensor_parallel_size,
        batch_size=fixed.get("batch_size") or vllm_config.scheduler_config.max_num_seqs,
        seq_len=fixed.get("seq_len") or model_config.max_model_len,
        max_context_length=fixed.get("max_context_length") or model_config.max_model_len,
        ctx_batch_size=fixed.get("ctx_batch_size") or 1,
        form=weight_form(fixed.get("weights") or BF16.name),
        dtype=dtype_name(model_config.dtype),
        lnc=fixed.get("logical_nc_config") or DEFAULT_LNC,
        **_blocks(vllm_config.cache_config),
        kv_seq_shards=fixed.get("kv_seq_shards") or 1,
    )
    check_fits(load_model_config(model_config.model), shape, instance)


def _blocks(cache_config: Any) -> dict[str, int]:
    if not cache_config.enable_prefix_caching:
        return {}
    return {"pa_block_size": cache_config.block_size, "pa_num_blocks": cache_config.num_gpu_blocks_override or 0}
