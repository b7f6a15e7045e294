"""What a model said of some prompts: tokens, logits and, on request, traces, in a folder of JSON and safetensors.

    recording.json               who said it, and the tokens of each prompt
    logits.safetensors           `0`, `1`, ...: float32 [T, vocab], the logits that chose each of a prompt's T tokens
    trace/STAGE.safetensors      `0.POINT`, ...: float32 [S, width] for all but the last of a prompt's positions

Golden outputs and recorded runs have this one form, so either can be compared with the other.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.files import PARTIAL_SUFFIX, write_json
from ..errors import ConfigError
from ..model_config import ModelConfig

RECORDING_FILE = "recording.json"
LOGITS_FILE = "logits.safetensors"
TRACE_FOLDER = "trace"
_FORMAT = 1
_DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)


@dataclass
class Entry:
    """One prompt: its text (None where it was given as ids), its token ids, and the tokens that the logits belong to.

    own_tokens: of a run that was given the golden tokens, those that it would have chosen itself.
    """

    text: str | None
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    own_tokens: list[int] | None = None


@dataclass
class Recording:
    """source: what computed it. dtype: of its computation. dimensions: of the model, to tell one model from another.
    stop_tokens end a generation, but are not chosen among its first min_new_tokens. logits: float32 [T, vocab] each."""

    source: str
    dtype: str
    dimensions: dict[str, int]
    entries: list[Entry]
    stop_tokens: list[int]
    min_new_tokens: int
    logits: list[Tensor] = field(default_factory=list)
    folder: Path | None = None

    @property
    def has_trace(self) -> bool:
        return self.folder is not None and (self.folder / TRACE_FOLDER).is_dir()

    def trace(self, stage: str) -> dict[str, Tensor]:
        return load_file(self.folder / TRACE_FOLDER / f"{stage}.safetensors")

    def save(self, folder: str | Path) -> None:
        """Writes all but the trace; recording.json last, so that it stands for a complete folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors({str(i): logits for i, logits in enumerate(self.logits)}, folder / LOGITS_FILE)
        fields = {name: value for name, value in vars(self).items() if name not in ("logits", "folder", "entries")}
        write_json(
            folder / RECORDING_FILE, {"format": _FORMAT} | fields | {"entries": [asdict(e) for e in self.entries]}
        )
        self.folder = folder


def dimensions(config: ModelConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in _DIMENSIONS}


def stages(dims: dict[str, int]) -> Iterator[str]:
    """The parts of a model of these dimensions in the order of its forward pass."""
    yield "embed_tokens"
    yield from (f"layers.{layer}" for layer in range(dims["num_hidden_layers"]))
    yield "norm"


def is_recording(folder: str | Path) -> bool:
    return (Path(folder) / RECORDING_FILE).exists()


def load_recording(folder: str | Path) -> Recording:
    """Raises ConfigError where the folder holds no complete recording."""
    folder = Path(folder)
    path = folder / RECORDING_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != _FORMAT:
            raise ConfigError(f"{path}: written by another version of this package; run golden again")
        entries = [Entry(**entry) for entry in fields.pop("entries")]
        with safe_open(folder / LOGITS_FILE, framework="pt") as file:
            logits = [file.get_tensor(str(i)) for i in range(len(entries))]
        recording = Recording(**fields, entries=entries, logits=logits, folder=folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: no such file; give a folder that golden or compare has written") from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: not a readable recording ({error}); run golden again") from None
    for i, (entry, rows) in enumerate(zip(entries, logits, strict=True)):
        if tuple(rows.shape) != (len(entry.tokens), recording.dimensions["vocab_size"]):
            raise ConfigError(f"{folder / LOGITS_FILE}: {i}: shape {list(rows.shape)} does not fit {RECORDING_FILE}")
    return recording


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Replaces a safetensors file at once: a reader sees the old content or the new."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
