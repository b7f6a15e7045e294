"""File access that is whole or an error: reads that fill their buffer, writes that finish, folders made durable."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError

PARTIAL_SUFFIX = ".partial"


def pread_into(descriptor: int, buffer: np.ndarray, offset: int, what: str) -> None:
    """Fills `buffer` (uint8) from `offset`. Raises CheckpointError that begins with `what` when the file ends early."""
    view = memoryview(buffer)
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{what}: cannot be read ({error.strerror}); check the disk") from None
        if count == 0:
            raise CheckpointError(f"{what}: the file ends early: it was cut short while being read; restore it")
        view, offset = view[count:], offset + count


def pwrite_all(descriptor: int, data: bytes | np.ndarray, offset: int) -> None:
    """Writes all of `data` at `offset`; raises OSError as the system does, for example when the disk is full."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write_json(path: Path, value: Any) -> None:
    """Replaces the file at once and durably: a reader sees the old content or the new."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Creates the folder and holds it alone. Raises CheckpointError when another process does, or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
    try:
        _lock(descriptor, folder)
        if not os.access(folder, os.W_OK):
            raise CheckpointError(f"{folder}: not writable; change its permissions or choose another folder")
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another run is writing here; wait for it or choose another folder") from None
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be locked ({error.strerror}); choose a folder on another disk"
        ) from None
