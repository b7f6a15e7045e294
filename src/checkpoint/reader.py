"""Reads a Hugging Face checkpoint folder: safetensors shards, one tensor or some rows of it at a time."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..dtypes import BY_SAFETENSORS
from ..errors import CheckpointError
from .files import pread_into
from .header import TensorEntry, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class CheckpointReader:
    """The tensors of a checkpoint folder, by name. Construction reads headers only; may be used by several threads.

    entries: where each tensor lies. problems: what is wrong with the index, the shards and their headers, a line each,
    for checks.check_tensors to report together with what is wrong with the tensors.
    """

    def __init__(self, model_dir: str | Path):
        self.model_dir = Path(model_dir)
        self.entries: dict[str, TensorEntry] = {}
        self.problems: list[str] = []
        self.index_metadata: dict[str, object] = {}
        self.files: list[str] = []
        self._unreadable_names: set[str] = set()
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._read_folder()
        self._stamps = self.stamps()

    def names(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return BY_SAFETENSORS[self.entries[name].dtype].to_torch()

    def is_unreadable(self, name: str) -> bool:
        """Whether the tensor should be in a shard that is among the problems: no need to tell of it too."""
        return name in self._unreadable_names

    def describe(self, name: str) -> str:
        """What a message calls the tensor: its file and its name."""
        return f"{self.file_of(name)}: {name}" if name in self.entries else f"{self.model_dir}: {name}"

    def file_of(self, name: str) -> Path:
        return self.model_dir / self.entries[name].file

    def read_rows(
        self, name: str, start: int, stop: int, buffer: np.ndarray, columns: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The bytes of rows start..stop along the first axis, read into `buffer` (uint8): uint8 [stop - start, bytes].

        columns: reads these only, row by row. Reads instead of mapping, so that memory stays bounded and a file cut
        short is an error, not a crash.
        """
        entry = self.entries[name]
        left, right = columns or (0, entry.columns)
        rows = buffer[: (stop - start) * (right - left) * entry.item_bytes].reshape(stop - start, -1)
        pieces = rows if rows.shape[1] < entry.row_bytes else [rows.reshape(-1)]
        offset = entry.offset + start * entry.row_bytes + left * entry.item_bytes
        for i, piece in enumerate(pieces):
            pread_into(self._descriptor(entry.file), piece, offset + i * entry.row_bytes, self.describe(name))
        return rows

    def stamps(self) -> dict[str, list[int]]:
        """Size in bytes and time of change in ns of each shard: tells one state of the folder from another."""
        stamps = {}
        for file in self.files:
            try:
                status = (self.model_dir / file).stat()
                stamps[file] = [status.st_size, status.st_mtime_ns]
            except OSError:
                stamps[file] = [-1, -1]
        return stamps

    def check_unchanged(self) -> None:
        """Raises CheckpointError naming the shards that changed since construction."""
        now = self.stamps()
        changed = [file for file in self.files if now[file] != self._stamps[file]]
        if changed:
            raise CheckpointError(f"{self.model_dir}: {', '.join(changed)} changed while being read; start again")

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.model_dir / file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{self.model_dir / file}: cannot be read ({error.strerror})") from None
            return self._descriptors[file]

    def _read_folder(self) -> None:
        weight_map = self._read_index()
        self.files = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
        unreadable = {file for file in self.files if not self._open(file)}
        if weight_map is not None:
            self._unreadable_names = {name for name, file in weight_map.items() if file in unreadable}
            self._check_index(weight_map)

    def _read_index(self) -> dict[str, str] | None:
        """The index's weight_map; None where a single file holds the model."""
        path = self.model_dir / INDEX_FILE
        if not path.exists():
            if (self.model_dir / SINGLE_FILE).exists():
                return None
            self.problems.append(f"{self.model_dir}: neither {INDEX_FILE} nor {SINGLE_FILE}; give a checkpoint folder")
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.index_metadata = dict(index.get("metadata") or {})
            return {str(name): str(file) for name, file in index["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(f"{path}: cannot be read ({error!r}); download it again")
            return {}

    def _open(self, file: str) -> bool:
        """Takes in the header of a shard; False if there is nothing to take."""
        path = self.model_dir / file
        if not path.exists():
            self.problems.append(f"{path}: named by {INDEX_FILE} but missing; download it")
            return False
        entries, problems = read_header(path)
        self.problems += problems
        for name, entry in entries.items():
            if name in self.entries:
                other = self.entries[name].file
                self.problems.append(f"{path}: {name}: is also in {other}; remove one of the two")
            else:
                self.entries[name] = entry
        return bool(entries)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            entry = self.entries.get(name)
            if name not in self._unreadable_names and (entry is None or entry.file != file):
                self.problems.append(f"{self.model_dir / file}: lacks {name}, which {INDEX_FILE} places there")
        for name, entry in self.entries.items():
            if name not in weight_map:
                self.problems.append(f"{self.model_dir / entry.file}: {name}: not in {INDEX_FILE}; download both again")
        total = self.index_metadata.get("total_size")
        tensors = sum(entry.nbytes for entry in self.entries.values())
        files = sum(max(size, 0) for size, _ in self.stamps().values())
        # Some writers count the tensors, some the files.
        if (
            total is not None
            and not self._unreadable_names
            and not (isinstance(total, int) and tensors <= total <= files)
        ):
            self.problems.append(
                f"{self.model_dir / INDEX_FILE}: total_size {total}, but the shards hold {tensors} bytes of tensors; "
                "download the index again"
            )
