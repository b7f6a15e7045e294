"""Tensors in memory, from a checkpoint or a state dict: decoded, combined and cut by the decoder of the sharder."""

from math import prod

import numpy as np
import torch
from torch import Tensor

from ..memory import check_memory
from ..model_config import ModelConfig
from ..weight_forms import BF16, WeightForm
from .checks import check_tensors
from .decoder import UnitDecoder
from .folder import Checkpoint
from .layout import Source, TensorSpec, in_form, model_layout
from .parallel import run_threads, thread_count
from .parts import MODEL, part_layout, part_rank_tensors
from .quantization import with_stored_blocks
from .source import TensorSource
from .stored import shape_of
from .units import Unit, plan_units

_WHOLE_REMEDY = "compile with save_sharded_checkpoint, or nxdi-deepseek shard, which writes rank files in little memory"


def state_dict_of(
    source: TensorSource,
    config: ModelConfig,
    dtype: torch.dtype,
    tp_degree: int,
    rank: int | None = None,
    form: WeightForm = BF16,
    part: str = MODEL,
) -> dict[str, Tensor]:
    """The tensors of a part (parts.py) in `dtype` (the router's correction bias in float32), and rank tensors: what
    `rank`'s file holds; without `rank` the whole tensors, which NxDI cuts, with int32 arange(tp_degree) as rank
    tensors. form: that of the routed experts. Of FP8 with a scale per channel NxDI gives all ranks one scale of `down`,
    where rank files have each rank's own: whole tensors hold other codes of it.

    Raises CheckpointError listing missing, extra and misshapen tensors, or naming one that holds NaN or infinity;
    ConfigError when memory cannot hold the result.
    """
    config = with_stored_blocks(config, source)
    check_tensors(source, config)
    form.check(config, tp_degree)
    specs, parts = part_layout(config, part, source), 1 if rank is None else tp_degree
    specs = list(in_form(specs, form, config, tp_degree))
    held = (tensor for spec in specs for tensor in spec.rank_tensors(dtype, parts))
    needed = sum(prod(shape) * tensor_dtype.itemsize for _, tensor_dtype, shape in held)
    if rank is None:
        check_memory(needed, "a state dict of the whole model", _WHOLE_REMEDY)
    else:
        check_memory(needed, f"a rank of tp_degree {tp_degree}", "use a larger tp_degree or a smaller torch_dtype")
    state_dict = _decoded(source, config, specs, dtype, parts, rank or 0)
    numbers = range(tp_degree) if rank is None else [rank]
    state_dict.update((name, torch.tensor(numbers, dtype=torch.int32)) for name in part_rank_tensors(config, part))
    return state_dict


def dequantized_state_dict(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The checkpoint under Hugging Face's own names without its FP8 encoding: what transformers' class loads."""
    check_tensors(checkpoint.reader, checkpoint.config)
    specs = {
        source.name: TensorSpec(source.name, (source,), float32=spec.float32)
        for spec in model_layout(checkpoint.config)
        for source in spec.sources
    }
    return _decoded(checkpoint.reader, checkpoint.config, list(specs.values()), dtype)


def read_weight(
    source: TensorSource, name: str, config: ModelConfig, dtype: torch.dtype, rows: tuple[int, int] | None = None
) -> Tensor:
    """A Hugging Face tensor, or its rows start..stop, in `dtype`; float8 weights are multiplied with their scales.

    Raises CheckpointError naming the tensor when it holds NaN or infinity, or cannot be read.
    """
    shape = shape_of(source, name)
    start, stop = rows or (0, shape[0])
    unit = Unit(TensorSpec(name, (Source(name, shape),)), 0, start, stop)
    tensor = torch.empty((stop - start, *shape[1:]), dtype=dtype)
    decoder = UnitDecoder(source, config, dtype)
    decoder.decode_region(unit, unit.region(0, 1), _bits(tensor.view(stop - start, -1)))
    return tensor


def _decoded(
    source: TensorSource,
    config: ModelConfig,
    specs: list[TensorSpec],
    dtype: torch.dtype,
    tp_degree: int = 1,
    rank: int = 0,
) -> dict[str, Tensor]:
    held = (tensor for spec in specs for tensor in spec.rank_tensors(dtype, tp_degree))
    tensors = {name: torch.empty(shape, dtype=tensor_dtype) for name, tensor_dtype, shape in held}
    decoder, units = UnitDecoder(source, config, dtype, tp_degree, [rank]), list(plan_units(specs))

    def decode(unit: Unit) -> None:
        region = unit.region(rank, tp_degree)
        if region:
            grid = tensors[unit.spec.name].view(unit.spec.grid.rank_shape(tp_degree))
            scale = tensors[unit.spec.scale_name][unit.expert].numpy() if unit.spec.scale else None
            decoder.decode_region(unit, region, _bits(grid[unit.expert, region.start : region.stop]), scale)

    for _ in run_threads(units, decode, min(thread_count(None), decoder.affordable_jobs(units))):
        pass
    return tensors


def _bits(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor as the decoder writes it."""
    return tensor.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[tensor.itemsize]).numpy()
