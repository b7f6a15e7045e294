"""What a long golden run keeps on disk, so that it can be killed at any moment and go on.

request.json              what was asked for; another request may not go on here
progress.json             after each pass: the sequences as they are
logits-NNNN.safetensors   `0`, ...: the rows of logits that chose tokens in that pass
hidden.safetensors        the hidden states between two layers of the pass under way, and which these are
cache/layers.N.safetensors  keys and values of the positions that went through that layer
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.files import write_json
from ..errors import ConfigError
from .greedy import Sequence
from .oracle import KeyValues
from .recording import save_tensors

Hidden = dict[int, Tensor]


class Progress:
    """The state of a run in `folder`: as it was left, or new. Raises ConfigError where another request left its own."""

    def __init__(self, folder: Path, request: dict[str, Any], sequences: list[Sequence]):
        self.folder, self.passes, self.sequences = folder, 0, sequences
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        request_file, self._file = folder / "request.json", folder / "progress.json"
        if request_file.exists():
            if json.loads(request_file.read_text(encoding="utf-8")) != request:
                raise ConfigError(
                    f"{folder}: an unfinished run of another model, prompt or option is here; finish it with the "
                    "arguments that it was started with, delete the folder, or choose another --out"
                )
        else:
            write_json(request_file, request)
        if self._file.exists():
            state = json.loads(self._file.read_text(encoding="utf-8"))
            self.passes, self.sequences = state["passes"], [Sequence(**fields) for fields in state["sequences"]]

    def end_pass(self, logits: dict[int, Tensor]) -> None:
        """Keeps the rows of logits that chose tokens, then the sequences: the second write is what counts."""
        save_tensors({str(i): rows for i, rows in logits.items()}, self._logits_file(self.passes))
        write_json(self._file, {"passes": self.passes + 1, "sequences": [asdict(s) for s in self.sequences]})
        self.passes += 1

    def logits(self) -> list[Tensor]:
        """All rows kept so far, [T, vocab] for each sequence."""
        files = [load_file(self._logits_file(n)) for n in range(self.passes)]
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
        with safe_open(path, framework="pt") as file:
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
        tensors = load_file(path) if path.exists() else {}
        caches = {}
        for i, sequence in sequences.items():
            pair = (tensors[f"{i}.0"], tensors[f"{i}.1"]) if sequence.cached else None
            caches[i] = KeyValues(pair)
            caches[i].crop(sequence.cached)
        return caches

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _logits_file(self, number: int) -> Path:
        return self.folder / f"logits-{number:04d}.safetensors"

    def _cache_file(self, layer: int) -> Path:
        return self.folder / "cache" / f"layers.{layer}.safetensors"
