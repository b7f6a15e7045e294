"""Golden outputs of a checkpoint of any size: a pass over its layers at a time, in a few GB of memory.

Every pass reads all dense weights and those experts that its tokens chose. The first one runs the whole prompts, the
others only what is new, over cached keys and values, so that they need few experts. A draft saves passes.

Drafts are checked as in speculative decoding (Leviathan et al., arXiv:2211.17192) with a greedy target: one pass over
all tokens of a draft gives the choice after each, and the draft holds as far as the choices agree with it.

What a run keeps on disk, so that it can be killed at any moment and go on:

request.json              what was asked for; another request may not go on here
progress.json             after each pass: the sequences as they are
logits-NNNN.safetensors   `0`, ...: the rows of logits that chose tokens in that pass
hidden.safetensors        the hidden states between two layers of the pass under way, and which these are
cache/layers.N.safetensors  keys and values of the positions that went through that layer
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
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
    load_tensors,
    make_folder,
    readable,
    save_json,
    save_tensors,
    write_expected_outputs,
)
from .tracing import trace_width

_WORK_FOLDER = "unfinished"
Report = Callable[[str], None]
Hidden = dict[int, Tensor]


@dataclass
class Sequence:
    """A prompt, the tokens chosen so far, a guess of those that follow, and how many positions are in the cache."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    cached: int = 0

    def new_tokens(self, rule: Rule) -> list[int]:
        """What the next pass must run: known tokens that are not cached, then as much of the draft as can be used."""
        room = rule.max_new_tokens - len(self.tokens) - 1
        return (self.prompt + self.tokens)[self.cached :] + self.draft[: max(room, 0)]

    def advance(self, logits: Tensor, rule: Rule) -> int:
        """Takes the tokens that logits [1 + drafted, vocab] choose, after the newest known token and each drafted one.

        Returns their number. The rest of the draft stays: after a token that differs it often goes on the same.
        """
        known = len(self.prompt) + len(self.tokens)
        taken = 0
        for row in logits:
            token = rule.choose(row, len(self.tokens))
            guess = self.draft.pop(0) if self.draft else None
            self.tokens.append(token)
            taken += 1
            if token != guess or rule.is_done(self.tokens):
                break
        self.cached = known + taken - 1
        return taken


class RunState:
    """The state of a run in `folder`: as it was left, or new. Raises ConfigError where another request left its own."""

    def __init__(self, folder: Path, request: dict[str, Any], sequences: list[Sequence]):
        self.folder, self.passes, self.sequences = folder, 0, sequences
        self._remedy = f"delete {folder} to start over"
        make_folder(folder / "cache")
        request_file, self._file = folder / "request.json", folder / "progress.json"
        if not request_file.exists():
            save_json(request, request_file)
        elif self._read_json(request_file) != request:
            raise ConfigError(
                f"{folder}: an unfinished run of another model, prompt or option is here; finish it with the "
                "arguments that it was started with, delete the folder, or choose another --out"
            )
        if self._file.exists():
            state = self._read_json(self._file)
            with readable(self._file, self._remedy):
                self.passes, self.sequences = state["passes"], [Sequence(**fields) for fields in state["sequences"]]

    def _read_json(self, path: Path) -> Any:
        with readable(path, self._remedy):
            return json.loads(path.read_text(encoding="utf-8"))

    def end_pass(self, logits: dict[int, Tensor]) -> None:
        """Keeps the rows of logits that chose tokens, then the sequences: the second write is what counts."""
        save_tensors({str(i): rows for i, rows in logits.items()}, self._logits_file(self.passes))
        save_json({"passes": self.passes + 1, "sequences": [asdict(s) for s in self.sequences]}, self._file)
        self.passes += 1

    def logits(self) -> list[Tensor]:
        """All rows kept so far, [T, vocab] for each sequence."""
        files = [load_tensors(self._logits_file(n), self._remedy) for n in range(self.passes)]
        return [torch.cat([file[str(i)] for file in files if str(i) in file]) for i in range(len(self.sequences))]

    def save_hidden(self, what: str, layer: int, hidden: Hidden) -> None:
        """Notes that pass `what` is about to enter `layer` with these hidden states."""
        tensors = {str(i): tensor for i, tensor in hidden.items()}
        save_tensors(tensors, self.folder / "hidden.safetensors", {"pass": what, "layer": str(layer)})

    def load_hidden(self, what: str) -> tuple[int, Hidden] | None:
        """The layer to go on with and its input, if pass `what` was under way."""
        path = self.folder / "hidden.safetensors"
        if not path.exists():
            return None
        with readable(path, self._remedy), safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["pass"] != what:
                return None
            return int(metadata["layer"]), {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def save_cache(self, layer: int, caches: dict[int, KeyValues]) -> None:
        tensors = {f"{i}.{part}": cache.tensors[part] for i, cache in caches.items() for part in (0, 1)}
        save_tensors(tensors, self._cache_file(layer))

    def load_cache(self, layer: int, sequences: dict[int, Sequence]) -> dict[int, KeyValues]:
        """What the layer keeps of the sequences. A pass that was killed, or a draft that did not hold, may have left
        more positions than count; these are cut off."""
        path = self._cache_file(layer)
        tensors = load_tensors(path, self._remedy) if path.exists() else {}
        caches = {}
        for i, sequence in sequences.items():
            with readable(path, self._remedy):
                caches[i] = KeyValues((tensors[f"{i}.0"], tensors[f"{i}.1"]) if sequence.cached else None)
                caches[i].crop(sequence.cached)
        return caches

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _logits_file(self, number: int) -> Path:
        return self.folder / f"logits-{number:04d}.safetensors"

    def _cache_file(self, layer: int) -> Path:
        return self.folder / "cache" / f"layers.{layer}.safetensors"


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
