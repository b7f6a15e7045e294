"""Reads a Hugging Face checkpoint folder: safetensors shards, one tensor or some rows of it at a time."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..dtypes import BY_SAFETENSORS
from ..errors import CheckpointError
from .files import pread_into
from .fused_experts import parts_of
from .header import TensorEntry, read_header
from .layout import canonical_name
from .problem_lines import problem_lines
from .shard_index import INDEX_FILE, ShardIndex, read_index
from .small_tensors import SmallTensors, scan_small_tensors

_SCANNERS = 16  # threads; small reads wait for the disk, not for a core


class CheckpointReader:
    """The tensors of a checkpoint folder, by name. Construction reads headers only; may be used by several threads.

    Names are those of the layout; a folder may store them with another prefix (layout.canonical_name), which only
    `describe` shows. entries: where each tensor lies. problems: what is wrong with the index, the shards and their
    headers, a line each, for checks.checkpoint_problems to report together with what is wrong with the tensors.
    """

    def __init__(self, model_dir: str | Path):
        self.model_dir = Path(model_dir)
        self.entries: dict[str, TensorEntry] = {}
        self.problems: list[str] = []
        self.files: list[str] = []
        self._headers: dict[str, str] = {}  # sound file -> digest of its header
        self._stored_names: dict[str, str] = {}
        self._parts: dict[str, list[str]] = {}  # stored name -> names in the layout, where these are several
        self._told: set[str] = set()
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
        """Whether the tensor's absence follows from what is among the problems: no need to tell of it too."""
        return name in self._told or not self.files

    def describe(self, name: str) -> str:
        """What a message calls the tensor: its file and its name."""
        if name not in self.entries:
            return f"{self.model_dir}: {name}"
        return f"{self.file_of(name)}: {self._stored_names.get(name, name)}"

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

    def nonfinite(self) -> list[str]:
        """The small tensors that hold NaN or infinity. Reads all of them (see small_tensors.py)."""
        return [name for small in self._small.values() for name in small.nonfinite]

    def identity(self) -> dict[str, list[int | str]]:
        """Size in bytes of each shard, digests of its header and of its small tensors: the same for a copy, whatever
        its time. Large tensors of other values in an equal header are not seen; `verify --full` sees them."""
        sizes = self.stamps()
        return {file: [sizes[file][0], self._headers[file], small.digest] for file, small in self._small.items()}

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

    @cached_property
    def _small(self) -> dict[str, SmallTensors]:
        """By file; those whose headers have problems are left out, as their tensors may lie anywhere."""
        entries: dict[str, list[tuple[str, TensorEntry]]] = {file: [] for file in self._headers}
        for name, entry in self.entries.items():
            if entry.file in entries:
                entries[entry.file].append((name, entry))
        with ThreadPoolExecutor(_SCANNERS) as pool:
            found = pool.map(lambda file: scan_small_tensors(entries[file], self._read_whole), entries)
            return dict(zip(entries, found, strict=True))

    def _read_whole(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        buffer = np.empty(entry.nbytes, np.uint8)
        pread_into(self._descriptor(entry.file), buffer, entry.offset, self.describe(name))
        return buffer

    def _read_folder(self) -> None:
        index = read_index(self.model_dir)
        self.files = index.files
        self.problems += index.problems
        unreadable = {file for file in self.files if not self._open(file)}
        if index.weight_map is not None:
            self._check_index(index, unreadable)

    def _open(self, file: str) -> bool:
        """Takes in the header of a shard; False if there is nothing to take."""
        path = self.model_dir / file
        if not path.exists():
            self.problems.append(f"{path}: named by {INDEX_FILE} but missing; download it")
            return False
        header = read_header(path)
        self.problems += header.problems
        if not header.problems:
            self._headers[file] = header.digest
        found = []
        for stored, entry in header.entries.items():
            parts = dict(parts_of(canonical_name(stored), entry))
            twice = next((name for name in parts if name in self.entries), None)
            if twice:
                found.append((f"{path}: {stored}", f"is also in {self.entries[twice].file}; remove one of the two"))
                continue
            self.entries.update(parts)
            self._stored_names.update((name, stored) for name in parts if name != stored)
            if len(parts) > 1:
                self._parts[stored] = list(parts)
        self.problems += problem_lines(found)
        return bool(header.entries) or not header.problems

    def _check_index(self, index: ShardIndex, unreadable: set[str]) -> None:
        weight_map = {
            name: file
            for stored, file in index.weight_map.items()
            for name in self._parts.get(stored, [canonical_name(stored)])
        }
        self._told = {name for name, file in weight_map.items() if file in unreadable}
        found = []
        for name, file in weight_map.items():
            entry = self.entries.get(name)
            if name not in self._told and (entry is None or entry.file != file):
                found.append((f"{self.model_dir / file}: {name}", f"missing, though {INDEX_FILE} places it there"))
        absent = {name for name in weight_map if name not in self.entries}
        for name in self.entries:
            if name not in weight_map:
                found.append((self.describe(name), f"not in {INDEX_FILE}; download both again"))
        self.problems += problem_lines(found)
        self._told |= absent
        if not self._told:
            self._check_total(index)

    def _check_total(self, index: ShardIndex) -> None:
        """Some writers count the tensors, some the files; some write whole numbers as 5813376.0."""
        total = index.total_size
        # Experts may share a scale.
        tensors = sum(size for _, _, size in {(e.file, e.offset, e.nbytes) for e in self.entries.values()})
        files = sum(max(size, 0) for size, _ in self.stamps().values())
        is_number = isinstance(total, int | float) and not isinstance(total, bool)
        if total is not None and not (is_number and total == total // 1 and tensors <= total <= files):
            self.problems.append(
                f"{self.model_dir / INDEX_FILE}: total_size {total!r}, but the shards hold {tensors} bytes of tensors; "
                "download the index again"
            )
