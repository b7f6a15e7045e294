"""A safetensors file whose size and places are known ahead, filled in any order, visible only when complete."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..progress_bar import format_bytes
from .files import PARTIAL_SUFFIX, pwrite_all
from .header import TensorEntry


class PlannedFile:
    """`head` and `entries` as header.build_header makes them. Until `commit` the file is called path + ".partial".

    Methods raise CheckpointError when the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path, head: bytes, entries: dict[str, TensorEntry]):
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self.head, self.entries = head, entries
        self.size = len(self.head) + sum(entry.nbytes for entry in self.entries.values())
        self._descriptor = -1

    def bytes_left(self) -> int:
        """What the disk must still give: the size, without what an earlier run has of the disk already."""
        try:
            return max(0, self.size - self.partial.stat().st_blocks * 512)
        except FileNotFoundError:
            return self.size

    def create(self) -> None:
        """Starts the file anew."""
        with self._told():
            self._descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.truncate(self._descriptor, self.size)
            pwrite_all(self._descriptor, self.head, 0)

    def reopen(self) -> bool:
        """Goes on with the file that an earlier run left; False when there is none of this plan."""
        try:
            with self.partial.open("rb") as file:
                if self.partial.stat().st_size != self.size or file.read(len(self.head)) != self.head:
                    return False
        except FileNotFoundError:
            return False
        with self._told():
            self._descriptor = os.open(self.partial, os.O_RDWR)
        return True

    def write(self, name: str, data: bytes | np.ndarray, offset: int = 0) -> None:
        """Writes `data` at `offset` bytes into the tensor."""
        with self._told():
            pwrite_all(self._descriptor, data, self.entries[name].offset + offset)

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        with self._told():
            os.fdatasync(self._descriptor)

    def commit(self) -> None:
        """Gives the file its name. The caller syncs the folder."""
        with self._told():
            os.fsync(self._descriptor)
            self.close()
            os.replace(self.partial, self.path)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                remedy = f"disk full; the file needs {self.size} bytes in all: free some and go on with --resume"
            else:
                remedy = f"cannot be written ({error.strerror}); mend that and go on with --resume"
            raise CheckpointError(f"{self.partial}: {remedy}") from None


def check_space(files: Iterable[PlannedFile], remedy: str) -> None:
    """Raises CheckpointError when a disk lacks the room for what is not yet written of `files`, all together."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for file in files:
        disk = file.path.parent.stat().st_dev
        folders.setdefault(disk, file.path.parent)
        needed[disk] = needed.get(disk, 0) + file.bytes_left()
    for disk, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[disk] > free:
            have = f"{format_bytes(needed[disk])} needed, {format_bytes(free)} free"
            raise CheckpointError(f"{folder}: disk full: {have}; {remedy}")
