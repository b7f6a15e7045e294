"""What an unfinished run has on the disk: one line per finished unit, written only after its data is durable."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .files import PARTIAL_SUFFIX, sync_folder

_REMEDY = "run without --resume to start over"


class Journal:
    """`digests` is uint64 [units, ranks], the checksum of each region; `sums` float64 [units, ranks, 2], those of
    decoder.Decoded; `done` is bool [units]."""

    def __init__(self, path: Path, identity: dict[str, Any], units: int, ranks: list[int]):
        self.path, self.identity = path, identity
        self.done = np.zeros(units, np.bool_)
        self._start(ranks)

    def _start(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.digests = np.zeros((len(self.done), len(ranks)), np.uint64)
        self.sums = np.zeros((len(self.done), len(ranks), 2))

    def create(self) -> None:
        """Appears with its first line or not at all, so that a run killed here can be resumed as one not yet begun."""
        partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.identity | {"ranks": self.ranks}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        sync_folder(self.path.parent)

    def load(self) -> None:
        """Takes up an earlier run, with its ranks. Raises CheckpointError when it had another source, dtype or so, and
        when the file is damaged."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut off by a crash
            found = json.loads(lines[0])
            differing = [key for key, value in self.identity.items() if found.get(key) != value]
            if differing:
                raise CheckpointError(f"{self.path}: the unfinished run had another {', '.join(differing)}; {_REMEDY}")
            self._take_up(found["ranks"], map(json.loads, lines[1:]))
            os.truncate(self.path, sum(len(line) + 1 for line in lines))
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: damaged ({error!r}); {_REMEDY}") from None

    def _take_up(self, ranks: list[int], entries: Iterable[Any]) -> None:
        if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
            raise ValueError("ranks must be a list of numbers")
        self._start(ranks)
        for unit, text, *more in entries:
            digests = np.frombuffer(bytes.fromhex(text), ">u8")
            if type(unit) is not int or not 0 <= unit < len(self.done) or len(digests) != len(ranks):
                raise ValueError(f"no unit of this sharding: {unit!r}")
            self.digests[unit], self.done[unit] = digests, True
            if more:
                self.sums[unit] = np.frombuffer(bytes.fromhex(more[0]), ">f8").reshape(-1, 2)

    def append(self, units: Iterable[int]) -> None:
        """Notes units as done, durably. Their data must be on the disk, their digests in `digests`."""
        with self.path.open("a", encoding="utf-8") as file:
            for unit in units:
                line = [unit, self.digests[unit].astype(">u8").tobytes().hex()]
                if self.sums[unit].any():
                    line.append(self.sums[unit].astype(">f8").tobytes().hex())
                file.write(json.dumps(line) + "\n")
                self.done[unit] = True
            file.flush()
            os.fsync(file.fileno())
