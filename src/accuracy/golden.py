"""Golden outputs of a checkpoint of any size: a pass over its layers at a time, in a few GB of memory.

Every pass reads all dense weights and those experts that its tokens chose. The first one runs the whole prompts, the
others only what is new, over cached keys and values, so that they need few experts. A draft saves passes.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..checkpoint.files import locked_folder
from ..errors import ConfigError
from ..model_config import read_config_json
from .expected_outputs import write_expected_outputs
from .greedy import Rule, Sequence
from .oracle import KeyValues, LayerOracle
from .progress import Hidden, Progress
from .recording import TRACE_FOLDER, Entry, Recording, dimensions, is_recording, load_recording, save_tensors

_WORK_FOLDER = "unfinished"
Report = Callable[[str], None]


def make_golden(
    model_dir: str | Path,
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
    Called again after it was stopped, it goes on. Raises ConfigError, CheckpointError.
    """
    out = Path(out)
    oracle = LayerOracle(model_dir, dtype)
    sequences = [Sequence(entry.prompt, draft=list(draft)) for entry, draft in zip(prompts, drafts, strict=True)]
    with locked_folder(out):
        finished, work = is_recording(out), out / _WORK_FOLDER
        if finished and not work.exists():
            raise ConfigError(f"{out}: holds finished outputs; choose another folder, or delete this one")
        progress = Progress(work, _request(oracle, model_dir, prompts, drafts, rule, trace), sequences)
        if finished:  # killed after the last write
            progress.remove()
            return load_recording(out)
        while not all(rule.is_done(sequence.tokens) for sequence in progress.sequences):
            _run_pass(oracle, progress, rule, report)
        if trace:
            _trace_pass(oracle, progress, out / TRACE_FOLDER, report)
        recording = Recording(
            source=f"transformers {transformers.__version__}",
            dtype=str(dtype).removeprefix("torch."),
            dimensions=dimensions(oracle.config),
            entries=[Entry(p.text, p.prompt, s.tokens) for p, s in zip(prompts, progress.sequences, strict=True)],
            stop_tokens=list(rule.stop_tokens),
            min_new_tokens=rule.min_new_tokens,
            logits=progress.logits(),
        )
        for i in range(len(prompts)):
            write_expected_outputs(recording, i, out / f"expected_outputs_{i}.pt", batch_size)
        recording.save(out)
        progress.remove()
    return recording


def _request(
    oracle: LayerOracle, model_dir: str | Path, prompts: list[Entry], drafts: Any, rule: Rule, trace: bool
) -> dict[str, Any]:
    """All that the outputs depend on."""
    return {
        "config": read_config_json(model_dir),
        "files": oracle.weights.reader.stamps(),
        "prompts": [asdict(prompt) for prompt in prompts],
        "drafts": drafts,
        "rule": asdict(rule) | {"stop_tokens": list(rule.stop_tokens)},
        "dtype": str(oracle.dtype),
        "trace": trace,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


def _run_pass(oracle: LayerOracle, progress: Progress, rule: Rule, report: Report) -> None:
    """Runs what is new of every unfinished sequence through all layers, and takes the tokens that follow."""
    active = {i: s for i, s in enumerate(progress.sequences) if not rule.is_done(s.tokens)}
    new_tokens = {i: sequence.new_tokens(rule) for i, sequence in active.items()}
    what = f"pass {progress.passes + 1}"

    def run_layer(layer: int, hidden: Hidden) -> Hidden:
        caches = progress.load_cache(layer, active)
        hidden = oracle.run_layer(layer, hidden, caches)
        progress.save_cache(layer, caches)
        return hidden

    hidden = _through_layers(oracle, progress, what, new_tokens, run_layer, report)
    kept = {}
    for i, sequence in active.items():
        drafted = sequence.cached + len(new_tokens[i]) - len(sequence.prompt) - len(sequence.tokens)
        logits = oracle.logits(hidden[i][-1 - drafted :])
        kept[i] = logits[: sequence.advance(logits, rule)]
    progress.end_pass(kept)
    done = sum(len(sequence.tokens) for sequence in progress.sequences)
    report(f"{what}: {sum(map(len, kept.values()))} tokens, {done} in all")


def _trace_pass(oracle: LayerOracle, progress: Progress, folder: Path, report: Report) -> None:
    """Runs the finished sequences, but for each one's last token, and writes what every module gives."""
    tokens = {i: (s.prompt + s.tokens)[:-1] for i, s in enumerate(progress.sequences)}
    folder.mkdir(exist_ok=True)

    def write(stage: str, tensors: dict[str, Tensor]) -> None:
        save_tensors(tensors, folder / f"{stage}.safetensors")

    def run_layer(layer: int, hidden: Hidden) -> Hidden:
        trace: dict[str, Tensor] = {}
        hidden = oracle.run_layer(layer, hidden, {i: KeyValues() for i in hidden}, trace)
        write(f"layers.{layer}", trace)
        return hidden

    write("embed_tokens", {f"{i}.embedding": oracle.embed(ids).float() for i, ids in tokens.items()})
    hidden = _through_layers(oracle, progress, "trace", tokens, run_layer, report)
    write("norm", {f"{i}.norm": oracle.final_norm(h).float() for i, h in hidden.items()})


def _through_layers(
    oracle: LayerOracle,
    progress: Progress,
    what: str,
    token_ids: dict[int, list[int]],
    run_layer: Callable[[int, Hidden], Hidden],
    report: Report,
) -> Hidden:
    """The hidden states after the last layer. Starts where a killed run of the same pass has left off."""
    layers, count = oracle.config.num_hidden_layers, sum(map(len, token_ids.values()))
    first, hidden = progress.load_hidden(what) or (0, {i: oracle.embed(ids) for i, ids in token_ids.items()})
    for layer in range(first, layers):
        report(f"{what}: layer {layer + 1} of {layers}, {count} positions of {len(token_ids)} prompts")
        hidden = run_layer(layer, hidden)
        progress.save_hidden(what, layer + 1, hidden)
    return hidden
