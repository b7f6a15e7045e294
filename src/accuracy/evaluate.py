"""Runs the model on the prompts of golden outputs and compares all that it says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import backend
from ..application import NeuronDeepseekV3ForCausalLM
from ..errors import ConfigError
from .bisect import Findings, compare_traces
from .compare import Comparison, compare
from .greedy import Rule
from .recording import Entry, Recording, dimensions
from .rounding import coarser
from .runner import Runner, free_run, joined_trace, prefilled, teacher_forced


def evaluate(
    model: NeuronDeepseekV3ForCausalLM, golden: Recording, gates: dict[str, float], bisect: bool = False
) -> Comparison:
    """Runs a loaded model, on either backend, whose seq_len holds the golden prompts and tokens.

    bisect: also compare what every module gives with the trace of the golden recording, on the CPU and with all prompts
    in one batch. The modules of a compiled model cannot be seen. Raises ConfigError.
    """
    run = record(model, golden)
    whole = _in_batches(model, golden.entries, prefilled)
    findings = trace_findings(model, golden) if bisect else None
    return compare(golden, run, gates, whole, findings)


def record(model: NeuronDeepseekV3ForCausalLM, golden: Recording) -> Recording:
    """What the model says where it is given the golden tokens, and the tokens that it chooses itself."""
    rule = Rule(max(len(entry.tokens) for entry in golden.entries), tuple(golden.stop_tokens), golden.min_new_tokens)
    own_tokens = _in_batches(model, golden.entries, lambda runner, entries: free_run(runner, entries, rule))
    entries = [replace(entry, own_tokens=own) for entry, own in zip(golden.entries, own_tokens, strict=True)]
    return Recording(
        source=backend.describe().removeprefix("backend: "),
        dtype=dtype_of(model),
        dimensions=dimensions(model.config.model),
        entries=entries,
        stop_tokens=golden.stop_tokens,
        min_new_tokens=golden.min_new_tokens,
        logits=_in_batches(model, golden.entries, teacher_forced),
    )


def trace_findings(model: NeuronDeepseekV3ForCausalLM, golden: Recording) -> Findings:
    entries, batch_size = golden.entries, model.neuron_config.batch_size
    if batch_size != len(entries):
        raise ConfigError(f"bisect needs batch_size {len(entries)}, the number of golden prompts, not {batch_size}")
    runner = Runner(model)
    runner.trace = {}
    teacher_forced(runner, entries)
    return compare_traces(golden, joined_trace(runner, entries).__getitem__, coarser(golden.dtype, dtype_of(model)))


def dtype_of(model: NeuronDeepseekV3ForCausalLM) -> str:
    return str(model.neuron_config.torch_dtype).removeprefix("torch.")


def _in_batches(
    model: NeuronDeepseekV3ForCausalLM, entries: list[Entry], run: Callable[[Runner, list[Entry]], list[Any]]
) -> list[Any]:
    """run(runner, entries) for batches of the model's size; the last is filled up with its last entry."""
    size, results = model.neuron_config.batch_size, []
    for start in range(0, len(entries), size):
        batch = entries[start : start + size]
        results += run(Runner(model), batch + batch[-1:] * (size - len(batch)))[: len(batch)]
    return results
