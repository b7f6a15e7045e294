"""Runs the model on the prompts of golden outputs and compares all that it says."""

import copy

from .. import backend
from ..modeling_deepseek import NeuronDeepseekV3ForCausalLM
from .bisect import Findings, compare_traces
from .compare import Comparison, compare
from .greedy import Rule
from .recording import Recording, dimensions
from .rounding import coarser
from .runner import Runner, free_run, joined_trace, prefilled, teacher_forced


def evaluate(
    model: NeuronDeepseekV3ForCausalLM, golden: Recording, gates: dict[str, float], bisect: bool = False
) -> Comparison:
    """Runs a loaded model, on either backend, whose batch_size and seq_len hold the golden prompts and tokens.

    bisect: also compare what every module gives with the trace of the golden recording. On a Neuron device the modules
    of a compiled model cannot be seen: use the CPU.
    """
    run = record(model, golden)
    whole = prefilled(Runner(model), golden.entries)
    findings = trace_findings(model, golden) if bisect else None
    return compare(golden, run, gates, whole, findings)


def record(model: NeuronDeepseekV3ForCausalLM, golden: Recording) -> Recording:
    """What the model says where it is given the golden tokens, and the tokens that it chooses itself."""
    rule = Rule(max(len(entry.tokens) for entry in golden.entries), tuple(golden.stop_tokens), golden.min_new_tokens)
    runner = Runner(model)
    logits = teacher_forced(runner, golden.entries)
    entries = [copy.copy(entry) for entry in golden.entries]
    for entry, tokens in zip(entries, free_run(runner, entries, rule), strict=True):
        entry.own_tokens = tokens
    return Recording(
        source=backend.describe(),
        dtype=str(model.neuron_config.torch_dtype).removeprefix("torch."),
        dimensions=dimensions(model.config),
        entries=entries,
        stop_tokens=golden.stop_tokens,
        min_new_tokens=golden.min_new_tokens,
        logits=logits,
    )


def trace_findings(model: NeuronDeepseekV3ForCausalLM, golden: Recording) -> Findings:
    runner = Runner(model)
    runner.trace = {}
    teacher_forced(runner, golden.entries)
    dtype = str(model.neuron_config.torch_dtype).removeprefix("torch.")
    trace = joined_trace(runner, golden.entries)
    return compare_traces(golden, trace.__getitem__, coarser(golden.dtype, dtype))
