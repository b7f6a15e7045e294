"""Tensors in memory, from a checkpoint or a state dict: decoded, combined and cut by the decoder of the sharder."""

from math import prod

import torch
from torch import Tensor

from ..memory import check_memory
from ..model_config import ModelConfig
from .checks import check_tensors
from .decoder import UnitDecoder
from .folder import Checkpoint
from .layout import Source, TensorSpec, model_layout, rank_tensor_names
from .parallel import run_threads, thread_count
from .quantization import with_stored_blocks
from .source import TensorSource
from .units import Unit, plan_units

_WHOLE_REMEDY = "compile with save_sharded_checkpoint, or nxdi-deepseek shard, which writes rank files in little memory"


def state_dict_of(
    source: TensorSource, config: ModelConfig, dtype: torch.dtype, tp_degree: int, rank: int | None = None
) -> dict[str, Tensor]:
    """The model's tensors in `dtype` (the router's correction bias in float32), and rank tensors: what `rank`'s file
    holds; without `rank` the whole tensors, which NxDI cuts, with int32 arange(tp_degree) as rank tensors.

    Raises CheckpointError listing missing, extra and misshapen tensors, or naming one that holds NaN or infinity;
    ConfigError when memory cannot hold the result.
    """
    config = with_stored_blocks(config, source)
    check_tensors(source, config)
    specs, parts = list(model_layout(config)), 1 if rank is None else tp_degree
    needed = sum(prod(spec.rank_shape(parts)) * spec.dtype(dtype).itemsize for spec in specs)
    if rank is None:
        check_memory(needed, "a state dict of the whole model", _WHOLE_REMEDY)
    else:
        check_memory(needed, f"a rank of tp_degree {tp_degree}", "use a larger tp_degree or a smaller torch_dtype")
    state_dict = _decoded(source, config, specs, dtype, parts, rank or 0)
    numbers = range(tp_degree) if rank is None else [rank]
    state_dict.update((name, torch.tensor(numbers, dtype=torch.int32)) for name in rank_tensor_names(config))
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
    shape = source.shape(name)
    start, stop = rows or (0, shape[0])
    unit = Unit(TensorSpec(name, (Source(name, shape),)), 0, start, stop)
    tensor = torch.empty((stop - start, *shape[1:]), dtype=dtype)
    _fill(tensor.view(1, stop - start, -1), UnitDecoder(source, config, dtype), unit, start)
    return tensor


def _decoded(
    source: TensorSource,
    config: ModelConfig,
    specs: list[TensorSpec],
    dtype: torch.dtype,
    tp_degree: int = 1,
    rank: int = 0,
) -> dict[str, Tensor]:
    tensors = {spec.name: torch.empty(spec.rank_shape(tp_degree), dtype=spec.dtype(dtype)) for spec in specs}
    decoder, units = UnitDecoder(source, config, dtype, tp_degree, [rank]), list(plan_units(specs))

    def decode(unit: Unit) -> None:
        grid_shape = unit.spec.grid.rank_shape(tp_degree)
        _fill(tensors[unit.spec.name].view(grid_shape), decoder, unit)

    for _ in run_threads(units, decode, min(thread_count(None), decoder.affordable_jobs(units))):
        pass
    return tensors


def _fill(grid: Tensor, decoder: UnitDecoder, unit: Unit, first_row: int = 0) -> None:
    """Decodes a unit to its place in a tensor [experts, rows, columns] that begins at `first_row`."""
    for _, region, bits in decoder.regions(unit):
        place = grid[unit.expert, region.start - first_row : region.stop - first_row]
        place.view(torch.from_numpy(bits).dtype).numpy()[...] = bits
