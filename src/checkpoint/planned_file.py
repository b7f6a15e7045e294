"""A safetensors file whose size and places are known ahead, filled in any order, visible only when complete."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
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
