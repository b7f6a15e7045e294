"""What a model said of some prompts: tokens, logits and, on request, traces, in a folder of JSON and safetensors.

    recording.json               who said it, and the tokens of each prompt
    logits.safetensors           `0`, `1`, ...: float32 [T, vocab], the logits that chose each of a prompt's T tokens
    trace/STAGE.safetensors      `0.POINT`, ...: float32 [S, width] for all but the last of a prompt's positions

Golden outputs and recorded runs have this one form, so either can be compared with the other. Golden folders also hold
what NxDI's inference_demo takes as --expected-outputs-path.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.files import PARTIAL_SUFFIX, sync_folder
from ..errors import ConfigError, DeepseekError
from ..model_config import ModelConfig

RECORDING_FILE = "recording.json"
LOGITS_FILE = "logits.safetensors"
TRACE_FOLDER = "trace"
_FORMAT = 1
_DTYPES = ("float32", "bfloat16")
_REMEDY = "record it again"
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


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen: the likeliest, no stop token among the first min_new_tokens, at most max_new_tokens."""

    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0

    def scores(self, logits: Tensor, step: int) -> Tensor:
        """The logits [vocab] that decide on the new token number `step`, from 0 on."""
        ruled_out = [token for token in self.stop_tokens if token < logits.shape[-1]]
        if step >= self.min_new_tokens or not ruled_out:
            return logits
        return logits.index_fill(-1, torch.tensor(ruled_out, device=logits.device), float("-inf"))

    def choose(self, logits: Tensor, step: int) -> int:
        return int(self.scores(logits, step).argmax())

    def is_done(self, tokens: list[int]) -> bool:
        return len(tokens) >= self.max_new_tokens or (bool(tokens) and tokens[-1] in self.stop_tokens)


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
        return load_tensors(self.folder / TRACE_FOLDER / f"{stage}.safetensors", _REMEDY)

    def rule(self) -> Rule:
        """How tokens are chosen in a run that is to be as long."""
        return Rule(max(len(entry.tokens) for entry in self.entries), tuple(self.stop_tokens), self.min_new_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes all but the trace; recording.json last, so that it stands for a complete folder."""
        folder = make_folder(folder)
        save_tensors({str(i): logits for i, logits in enumerate(self.logits)}, folder / LOGITS_FILE)
        fields = {name: value for name, value in vars(self).items() if name not in ("logits", "folder", "entries")}
        fields = {"format": _FORMAT} | fields | {"entries": [asdict(entry) for entry in self.entries]}
        save_json(fields, folder / RECORDING_FILE)
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
    if not path.exists():
        raise ConfigError(f"{path}: no such file; give a folder that golden or compare has written")
    with readable(path, _REMEDY):
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != _FORMAT:
            raise ConfigError(f"{path}: written by another version of this package; {_REMEDY}")
        entries = [Entry(**entry) for entry in fields.pop("entries")]
        recording = Recording(**fields, entries=entries, folder=folder)
        _check_fields(recording)
    tensors = load_tensors(folder / LOGITS_FILE, _REMEDY)
    for i, entry in enumerate(entries):
        shape = (len(entry.tokens), recording.dimensions["vocab_size"])
        rows = tensors.get(str(i), torch.empty(0))
        if tuple(rows.shape) != shape or rows.dtype != torch.float32:
            found = f"{rows.dtype} {list(rows.shape)}".removeprefix("torch.")
            raise ConfigError(
                f"{folder / LOGITS_FILE}: {i}: {found} is not float32 {list(shape)} of {RECORDING_FILE}; {_REMEDY}"
            )
        recording.logits.append(rows)
    return recording


def _check_fields(recording: Recording) -> None:
    """Raises ValueError naming a field that no recording has in this form."""

    sizes = recording.dimensions
    rows = [row for entry in recording.entries for row in (entry.prompt, entry.tokens, entry.own_tokens or [0])]
    if recording.dtype not in _DTYPES:
        raise ValueError(f"dtype {recording.dtype!r} is none of {', '.join(_DTYPES)}")
    if not all(type(sizes[name]) is int and sizes[name] > 0 for name in _DIMENSIONS):
        raise ValueError("dimensions must be above 0")
    if not rows or not all(rows):
        raise ValueError("a prompt without tokens")
    if not all(type(token) is int and 0 <= token < sizes["vocab_size"] for row in rows for token in row):
        raise ValueError("a token outside the vocabulary")


def load_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ConfigError that ends with the remedy."""
    with readable(path, remedy):
        return load_file(path)


def save_json(value: Any, path: Path) -> None:
    """Writes a JSON file as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file as `replacing` does."""
    with replacing(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)


@contextmanager
def readable(path: Path, remedy: str) -> Iterator[None]:
    """Turns whatever a reader raises on a damaged file into a ConfigError of one line that ends with the remedy."""
    try:
        yield
    except DeepseekError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; {remedy}") from None
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); {remedy}") from None


def make_folder(folder: str | Path) -> Path:
    """The folder, which is created if need be. Raises ConfigError where it cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
    return Path(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, then puts that file in the place of `path`: a reader sees the old content or the new,
    after a loss of power too. Raises ConfigError where it cannot be written."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be written ({error}); free some space or choose another folder") from None
    finally:
        partial.unlink(missing_ok=True)


def write_expected_outputs(recording: Recording, index: int, path: str | Path, batch_size: int = 1) -> None:
    """Writes one prompt's outputs in the form of Hugging Face's generate(return_dict_in_generate, output_scores).

    inference_demo repeats its first --prompt batch_size times, so the file does too: `sequences` int64 [B, S + T] for
    its token matching, `scores` a tuple of T tensors float32 [B, vocab] for its logit matching. Stop tokens that were
    ruled out have the score -inf, as generate gives them.
    The two are attributes of an OrderedDict: torch.load with weights_only, its default since torch 2.6, builds no class
    of transformers, but restores the attributes of this one.
    """
    entry = recording.entries[index]
    rule = Rule(len(entry.tokens), tuple(recording.stop_tokens), recording.min_new_tokens)
    outputs = OrderedDict()
    outputs.sequences = torch.tensor(entry.prompt + entry.tokens).expand(batch_size, -1)
    rows = recording.logits[index]
    outputs.scores = tuple(rule.scores(row, step).expand(batch_size, -1) for step, row in enumerate(rows))
    with replacing(Path(path)) as partial:
        torch.save(outputs, partial)
