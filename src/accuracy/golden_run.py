"""Golden outputs of a checkpoint of any size: a pass over its layers at a time, in a few GB of memory.

Every pass reads all dense weights and those experts that its tokens chose. The first one runs the whole prompts, the
others only what is new, over cached keys and values, so that they need few experts. A draft saves passes.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..checkpoint.files import locked_folder
from ..checkpoint.folder import Checkpoint
from ..dtypes import dtype_name
from ..errors import ConfigError
from .oracle import KeyValues, LayerOracle
from .recording import (
    TRACE_FOLDER,
    Entry,
    Recording,
    Rule,
    dimensions,
    is_recording,
    load_recording,
    make_folder,
    save_tensors,
    write_expected_outputs,
)
from .run_state import Hidden, RunState, Sequence
from .tracing import trace_width

_WORK_FOLDER = "unfinished"
Report = Callable[[str], None]


def make_golden(
    checkpoint: Checkpoint,
    prompts: list[Entry],
    drafts: list[list[int]],
    rule: Rule,
    out: str | Path,
    dtype: torch.dtype = torch.float32,
    trace: bool = False,
    batch_size: int = 1,
    report: Report = lambda line: None,
) -> Recording:
    """Extends the prompts greedily and writes a recording (see recording.py) and NxDI's expected outputs to `out`.

    drafts: a guess of each prompt's continuation, may be empty. trace: also write what every module gives, in one more
    pass. batch_size: of the NxDI run that will be compared with the expected outputs. report: gets a line per layer.
    Called again after it was stopped, it goes on. Raises CheckpointError, and ConfigError where the disk is too small.
    """
    out = Path(out)
    oracle = LayerOracle(checkpoint, dtype)
    sequences = [Sequence(entry.prompt, draft=list(draft)) for entry, draft in zip(prompts, drafts, strict=True)]
    _check_space(out, space_needed(oracle, prompts, rule.max_new_tokens, trace))
    with locked_folder(out):
        finished, work = is_recording(out), out / _WORK_FOLDER
        if finished and not work.exists():
            raise ConfigError(f"{out}: holds finished outputs; choose another folder, or delete this one")
        state = RunState(work, _request(oracle, prompts, drafts, rule, trace), sequences)
        if finished:  # killed after the last write
            state.remove()
            return load_recording(out)
        while not all(rule.is_done(sequence.tokens) for sequence in state.sequences):
            _run_pass(oracle, state, rule, report)
        if trace:
            _trace_pass(oracle, state, out / TRACE_FOLDER, report)
        checkpoint.reader.check_unchanged()
        recording = _recording(oracle, prompts, rule, state)
        for i in range(len(prompts)):
            write_expected_outputs(recording, i, out / f"expected_outputs_{i}.pt", batch_size)
        recording.save(out)
        state.remove()
    return recording


def space_needed(oracle: LayerOracle, prompts: list[Entry], new_tokens: int, trace: bool) -> int:
    """Bytes that `out` holds at most, headers of the files aside."""
    config = oracle.config
    positions = sum(len(entry.prompt) + new_tokens - 1 for entry in prompts)
    logits = 4 * len(prompts) * new_tokens * config.vocab_size
    # A file is written beside the one that it replaces: one more layer's cache, and the hidden states twice.
    numbers = oracle.cache_width * (config.num_hidden_layers + 1) + 2 * config.hidden_size
    # The logits of all passes, of the recording, and of NxDI's expected outputs.
    needed = 3 * logits + positions * numbers * oracle.dtype.itemsize
    return needed + 4 * positions * trace_width(config) if trace else needed


def _check_space(out: Path, needed: int) -> None:
    """What an unfinished run has left in `out` is there already."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if needed - there > free:
        raise ConfigError(
            f"{out}: golden outputs need {needed / 1e9:.3g} GB with all that is kept on the way, and {free / 1e9:.3g} "
            "GB are free; free some, choose another folder, or ask for fewer tokens"
        )


def _request(
    oracle: LayerOracle, prompts: list[Entry], drafts: list[list[int]], rule: Rule, trace: bool
) -> dict[str, Any]:
    """All that the outputs depend on."""
    return {
        "config": oracle.checkpoint.fields,
        "files": oracle.checkpoint.reader.stamps(),
        "prompts": [asdict(prompt) for prompt in prompts],
        "drafts": drafts,
        "rule": asdict(rule) | {"stop_tokens": list(rule.stop_tokens)},
        "dtype": str(oracle.dtype),
        "trace": trace,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


def _recording(oracle: LayerOracle, prompts: list[Entry], rule: Rule, state: RunState) -> Recording:
    return Recording(
        source=f"transformers {transformers.__version__}",
        dtype=dtype_name(oracle.dtype),
        dimensions=dimensions(oracle.config),
        entries=[Entry(p.text, p.prompt, s.tokens) for p, s in zip(prompts, state.sequences, strict=True)],
        stop_tokens=list(rule.stop_tokens),
        min_new_tokens=rule.min_new_tokens,
        logits=state.logits(),
    )


def _run_pass(oracle: LayerOracle, state: RunState, rule: Rule, report: Report) -> None:
    """Runs what is new of every unfinished sequence through all layers, and takes the tokens that follow."""
    active = {i: s for i, s in enumerate(state.sequences) if not rule.is_done(s.tokens)}
    new_tokens = {i: sequence.new_tokens(rule) for i, sequence in active.items()}
    what = f"pass {state.passes + 1}"

    def run_layer(layer: int, hidden: Hidden) -> Hidden:
        caches = state.load_cache(layer, active)
        hidden = oracle.run_layer(layer, hidden, caches)
        state.save_cache(layer, caches)
        return hidden

    hidden = _through_layers(oracle, state, what, new_tokens, run_layer, report)
    kept = {}
    for i, sequence in active.items():
        drafted = sequence.cached + len(new_tokens[i]) - len(sequence.prompt) - len(sequence.tokens)
        logits = oracle.logits(hidden[i][-1 - drafted :])
        kept[i] = logits[: sequence.advance(logits, rule)]
    state.end_pass(kept)
    done = sum(len(sequence.tokens) for sequence in state.sequences)
    report(f"{what}: {sum(map(len, kept.values()))} tokens, {done} in all")


def _trace_pass(oracle: LayerOracle, state: RunState, folder: Path, report: Report) -> None:
    """Runs the finished sequences, but for each one's last token, and writes what every module gives."""
    tokens = {i: (s.prompt + s.tokens)[:-1] for i, s in enumerate(state.sequences)}
    make_folder(folder)

    def write(stage: str, tensors: dict[str, Tensor]) -> None:
        save_tensors(tensors, folder / f"{stage}.safetensors")

    def run_layer(layer: int, hidden: Hidden) -> Hidden:
        trace: dict[str, Tensor] = {}
        hidden = oracle.run_layer(layer, hidden, {i: KeyValues() for i in hidden}, trace)
        write(f"layers.{layer}", trace)
        return hidden

    write("embed_tokens", {f"{i}.embedding": oracle.embed(ids).float() for i, ids in tokens.items()})
    hidden = _through_layers(oracle, state, "trace", tokens, run_layer, report)
    write("norm", {f"{i}.norm": oracle.final_norm(h).float() for i, h in hidden.items()})


def _through_layers(
    oracle: LayerOracle,
    state: RunState,
    what: str,
    token_ids: dict[int, list[int]],
    run_layer: Callable[[int, Hidden], Hidden],
    report: Report,
) -> Hidden:
    """The hidden states after the last layer. Starts where a killed run of the same pass has left off."""
    layers, count = oracle.config.num_hidden_layers, sum(map(len, token_ids.values()))
    first, hidden = state.load_hidden(what) or (0, {i: oracle.embed(ids) for i, ids in token_ids.items()})
    for layer in range(first, layers):
        report(f"{what}: layer {layer + 1} of {layers}, {count} positions of {len(token_ids)} prompts")
        hidden = run_layer(layer, hidden)
        state.save_hidden(what, layer + 1, hidden)
    return hidden
