"""How far a golden run is: its sequences and drafts, kept on disk so that it can be killed at any moment and go on.

request.json              what was asked for; another request may not go on here
progress.json             after each pass: the sequences as they are
logits-NNNN.safetensors   `0`, ...: the rows of logits that chose tokens in that pass
hidden.safetensors        the hidden states between two layers of the pass under way, and which these are
cache/layers.N.safetensors  keys and values of the positions that went through that layer

Drafts are checked as in speculative decoding (Leviathan et al., arXiv:2211.17192) with a greedy target: one pass over
all tokens of a draft gives the choice after each, and the draft holds as far as the choices agree with it.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, cat

from ..errors import ConfigError
from .oracle import KeyValues
from .recording import Rule, load_tensors, make_folder, readable, save_json, save_tensors

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
        return [cat([file[str(i)] for file in files if str(i) in file]) for i in range(len(self.sequences))]

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
