"""A plan as text and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError
from ..model_config import ModelConfig
from ..weight_forms import FORMS
from .command_lines import command_lines
from .fitting import BATCHES, largest_batch_size, largest_seq_len, lengths, nearest_that_fits, possible_tp_degrees
from .host_needs import HostNeeds, host_needs
from .instances import Instance
from .rank_memory import CompiledShape, RankMemory, cache_bytes_per_token, rank_memory

_BAR = 40  # characters


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of one shape on one instance.

    seq_lens: the largest seq_len by batch_size, 0 where nothing fits. batch_sizes: the reverse. alternatives: bytes per
    rank by (weights, tp_degree) for the same batch and length. nearest: changes with which it loads, if it does not.
    """

    model_type: str
    instance: Instance
    shape: CompiledShape
    memory: RankMemory
    cache_per_token: int
    seq_lens: dict[int, int]
    batch_sizes: dict[int, int]
    alternatives: dict[tuple[str, int], int]
    nearest: list[str]
    host: HostNeeds
    commands: dict[str, str]


def make_memory_plan(
    config: ModelConfig, shape: CompiledShape, instance: Instance, model_dir: str, checkpoint: int | None = None
) -> MemoryPlan:
    """checkpoint: bytes of the checkpoint in `model_dir`, None if there is none. Raises ConfigError for a shape that
    cannot be, not for one that does not fit."""
    memory = rank_memory(config, shape, instance)
    return MemoryPlan(
        model_type=config.model_type,
        instance=instance,
        shape=shape,
        memory=memory,
        cache_per_token=cache_bytes_per_token(config, shape.dtype),
        seq_lens={batch: largest_seq_len(config, shape.with_(batch_size=batch), instance) for batch in BATCHES},
        batch_sizes={n: largest_batch_size(config, shape.with_(seq_len=n), instance) for n in lengths(config)},
        alternatives=_alternatives(config, shape, instance),
        nearest=[] if memory.fits else nearest_that_fits(config, shape, instance),
        host=host_needs(config, shape, instance, checkpoint),
        commands=command_lines(config, shape, model_dir) if memory.fits else {},
    )


def _alternatives(config: ModelConfig, shape: CompiledShape, instance: Instance) -> dict[tuple[str, int], int]:
    totals = {}
    for form in FORMS.values():
        for degree in possible_tp_degrees(config, instance.logical_cores(shape.lnc)):
            try:
                totals[form.name, degree] = rank_memory(
                    config, shape.with_(form=form, tp_degree=degree), instance
                ).total
            except ConfigError:  # the form is not to be had for this degree
                continue
    return totals


def plan_text(plan: MemoryPlan) -> str:
    """Table, bars and command lines for a terminal."""
    return "\n".join(_text_lines(plan))


def _text_lines(plan: MemoryPlan) -> Iterator[str]:
    shape, memory, instance = plan.shape, plan.memory, plan.instance
    yield (
        f"{plan.model_type} on {instance.name}, LNC {shape.lnc}: tp_degree {shape.tp_degree}, weights "
        f"{shape.form.name}, batch_size {shape.batch_size}, seq_len {shape.seq_len}, kv_seq_shards "
        f"{shape.kv_seq_shards}, prompts {'in chunks of' if shape.pa_block_size else 'up to'} {shape.prompt_length}, "
        f"{shape.prompts} at a time"
    )
    yield ""
    yield "GB on each rank"
    for part, size in memory.parts.items():
        if size:
            yield f"  {part:<16}{size / 1e9:9.3f}  {_bar(size, memory.capacity)}"
    spare = f"{abs(memory.free) / 1e9:.2f}"
    verdict = f"fits, {spare} free" if memory.fits else f"DOES NOT FIT, {spare} too much"
    yield f"  {'all':<16}{memory.total / 1e9:9.3f}  of {memory.capacity / 1e9:.0f}: {verdict}"
    if plan.nearest:
        yield f"  what does: {', or '.join(plan.nearest)}"
    yield ""
    yield f"largest seq_len by batch_size   ({_cache_words(plan)})"
    yield from _bars({f"batch {batch}": length for batch, length in plan.seq_lens.items()})
    yield "largest batch_size by seq_len"
    yield from _bars({f"{length:,}": batch for length, batch in plan.batch_sizes.items()})
    yield "GB on each rank, the same batch and length"
    yield from _alternative_lines(plan)
    yield ""
    yield from _host_lines(plan)
    for what, line in plan.commands.items():
        yield f"\n# {what}\n{line}"


def _cache_words(plan: MemoryPlan) -> str:
    shards = plan.shape.kv_seq_shards
    words = f"{plan.cache_per_token:,} bytes of cache a token"
    return words if shards == 1 else f"{words}, on one of {shards} ranks"


def _bars(figures: dict[str, int]) -> Iterator[str]:
    most = max(figures.values())
    for name, figure in figures.items():
        yield f"  {name:<12}{f'{figure:,}' if figure else 'none':>10}  {_bar(figure, most)}"
    yield ""


def _bar(part: int, whole: int) -> str:
    return "#" * round(_BAR * min(1.0, part / whole)) if whole else ""


def _alternative_lines(plan: MemoryPlan) -> Iterator[str]:
    degrees = sorted({degree for _, degree in plan.alternatives})
    yield "  weights   " + "".join(f"{f'TP {degree}':>11}" for degree in degrees)
    for form in FORMS:
        totals = [plan.alternatives.get((form, degree)) for degree in degrees]
        cells = (_alternative_cell(total, plan.memory.capacity) for total in totals)
        yield f"  {form:<10}" + "".join(f"{cell:>11}" for cell in cells)
    yield f"  * more than {plan.memory.capacity / 1e9:.0f}"


def _alternative_cell(total: int | None, capacity: int) -> str:
    return "-" if total is None else f"{total / 1e9:.2f}{'*' if total > capacity else ' '}"


def _host_lines(plan: MemoryPlan) -> Iterator[str]:
    host, instance = plan.host, plan.instance
    source = "" if host.checkpoint is None else f", and {host.checkpoint / 1e9:.1f} of the checkpoint"
    yield "host"
    yield f"  rank files      {plan.shape.tp_degree} x {host.rank_file:,} bytes = {host.rank_files / 1e9:.1f} GB"
    room = _room(host.disk_fits, instance.nvme_bytes, "NVMe")
    yield f"  disk            {host.rank_files / 1e9:.1f} GB of rank files{source}; {room}"
    yield f"  shard           below {host.sharding / 2**30:.0f} GiB of memory"
    yield (
        f"  load            {host.loading / 1e9:.1f} GB of memory, as NxDI reads all rank files first; "
        f"{_room(host.loading_fits, instance.host_bytes, 'memory')}"
    )


def _room(fits: bool | None, there: int | None, what: str) -> str:
    if fits is None:
        return f"{what} of the instance not known"
    return f"{there / 1e9:,.0f} GB of {what}: {'enough' if fits else 'NOT ENOUGH'}"


def plan_json(plan: MemoryPlan) -> dict[str, Any]:
    """The same as plain values. Sizes are bytes."""
    shape = {field.name: getattr(plan.shape, field.name) for field in fields(plan.shape) if field.name != "form"}
    return {
        "model_type": plan.model_type,
        "instance": asdict(plan.instance),
        "shape": shape
        | {
            "weights": plan.shape.form.name,
            "max_context_length": plan.shape.prompt_length,
            "ctx_batch_size": plan.shape.prompts,
        },
        "rank": {
            "parts": plan.memory.parts,
            "total": plan.memory.total,
            "capacity": plan.memory.capacity,
            "fits": plan.memory.fits,
        },
        "cache_per_token": plan.cache_per_token,
        "largest_seq_len": plan.seq_lens,
        "largest_batch_size": plan.batch_sizes,
        "alternatives": [
            {"weights": form, "tp_degree": degree, "total": total, "fits": total <= plan.memory.capacity}
            for (form, degree), total in plan.alternatives.items()
        ],
        "nearest": plan.nearest,
        "host": asdict(plan.host),
        "commands": plan.commands,
    }
