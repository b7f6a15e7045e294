"""What fits: the largest sequence for a batch, the largest batch for a sequence, the nearest shape that loads."""

from collections.abc import Callable, Iterator

from ..errors import ConfigError
from ..model_config import ModelConfig
from ..weight_forms import FORMS
from .instances import Instance
from .rank_memory import CompiledShape, RankMemory, rank_memory
from .shard_choice import possible_shards

STEP = 128  # lengths are multiples of it, as buckets are
LARGEST_BATCH = 1024
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def largest_seq_len(config: ModelConfig, shape: CompiledShape, instance: Instance) -> int:
    """The largest multiple of 128 that fits, up to max_position_embeddings; 0 where none does."""
    steps = max(1, config.max_position_embeddings // STEP)
    return STEP * _largest(steps, lambda n: _fits(config, shape.with_(seq_len=n * STEP), instance))


def largest_batch_size(config: ModelConfig, shape: CompiledShape, instance: Instance) -> int:
    """The largest batch up to 1,024 that fits, 0 where none does."""
    return _largest(LARGEST_BATCH, lambda n: _fits(config, shape.with_(batch_size=n), instance))


def lengths(config: ModelConfig) -> Iterator[int]:
    """512 and its doubles, and the longest that the model knows."""
    length = 512
    while length < config.max_position_embeddings:
        yield length
        length *= 2
    yield config.max_position_embeddings


def possible_tp_degrees(config: ModelConfig, cores: int) -> Iterator[int]:
    """The powers of 2 (those that Neuron takes on trn2) up to `cores` that divide the model."""
    degree = 1
    while degree <= cores:
        try:
            config.check_tensor_parallel(degree)
            yield degree
        except ConfigError:
            pass
        degree *= 2


def nearest_that_fits(config: ModelConfig, shape: CompiledShape, instance: Instance) -> list[str]:
    """Changes of one thing each with which the shape fits, in words; empty where there is none."""
    found = []
    if length := min(largest_seq_len(config, shape, instance), shape.seq_len):
        found.append(f"seq_len {length}")
    if 1 <= (batch := largest_batch_size(config, shape, instance)) < shape.batch_size:
        found.append(f"batch_size {batch}")
    if shape.prompt_length > STEP:
        shorter = _largest(
            shape.prompt_length // STEP,
            lambda n: _fits(config, shape.with_(max_context_length=n * STEP), instance),
        )
        found += [f"max_context_length {shorter * STEP}"] if shorter else []
    wider = (n for n in possible_shards(shape.tp_degree, shape.pa_block_size) if n > shape.kv_seq_shards)
    found += [f"kv_seq_shards {n}" for n in wider if _fits(config, shape.with_(kv_seq_shards=n), instance)][:1]
    forms = (form for form in FORMS.values() if form is not shape.form)
    found += [f"weights {form.name}" for form in forms if _fits(config, shape.with_(form=form), instance)]
    degrees = possible_tp_degrees(config, instance.logical_cores(shape.lnc))
    larger = (n for n in degrees if n > shape.tp_degree and _fits(config, shape.with_(tp_degree=n), instance))
    found += [f"tp_degree {n}" for n in larger][:1]
    return found


def check_fits(config: ModelConfig, shape: CompiledShape, instance: Instance) -> RankMemory:
    """Raises ConfigError in one line naming what does load, where a rank's memory is too small for the shape."""
    memory = rank_memory(config, shape, instance)
    if not memory.fits:
        weights = sum(memory.parts[part] for part in memory.parts if part not in _BESIDE_WEIGHTS)
        remedies = nearest_that_fits(config, shape, instance)
        remedy = f"use {' or '.join(remedies)}" if remedies else f"nothing of it loads on {instance.name}"
        raise ConfigError(
            f"tp_degree {shape.tp_degree}, batch_size {shape.batch_size}, seq_len {shape.seq_len}, weights "
            f"{shape.form.name}: {memory.total / 1e9:.2f} GB on each rank, {weights / 1e9:.2f} of them weights, and a "
            f"logical core of {instance.name} has {memory.capacity / 1e9:.0f}; {remedy}"
        )
    return memory


_BESIDE_WEIGHTS = ("cache", "logits", "prompt scratch", "runtime reserve")


def _fits(config: ModelConfig, shape: CompiledShape, instance: Instance) -> bool:
    try:
        return rank_memory(config, shape, instance).fits
    except ConfigError:
        return False


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n from 1 to `most` that fits, where all smaller ones do too; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
