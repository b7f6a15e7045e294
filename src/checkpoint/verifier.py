"""Compares rank files with the checkpoint they were made from: recomputes regions and compares them bit for bit."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dtypes import model_dtype
from ..errors import CheckpointError, ConfigError, report_problems
from ..model_config import read_model_config
from ..weight_forms import weight_form
from .decoder import UnitDecoder
from .files import pread_into
from .folder import Checkpoint
from .manifest import Manifest, digest, tensor_checksum
from .parallel import run_threads, thread_count
from .parts import MODEL, MTP
from .plan import ShardPlan, part_folder
from .reader import CheckpointReader
from .sharder import rank_value


@dataclass(frozen=True)
class VerifySummary:
    """Files looked at, and bytes of them that were recomputed and compared."""

    files: int
    bytes: int
    seconds: float


def verify_shards(
    model_dir: str | Path,
    out_dir: str | Path,
    sample: float = 0.01,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifySummary:
    """Recomputes a random `sample` (0 to 1) of what `shard_checkpoint` wrote to `out_dir`, the MTP layers included.

    The checkpoint is read with the config.json that the rank files were made with. Headers and rank tensors are
    compared always; with sample 1 everything is, the manifest's checksums too. Only then a checkpoint is told for sure
    from one of equal sizes, headers and small tensors with another large weight. Raises CheckpointError that names
    every file and tensor that differs.
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"--sample {sample}: give a share above 0 and at most 1")
    start, jobs, files, compared = time.monotonic(), thread_count(jobs), 0, 0
    parts = [part for part in (MODEL, MTP) if part_folder(out_dir, part).exists()]
    if not parts:
        raise CheckpointError(f"{part_folder(out_dir, MODEL)}: no such folder; give the OUT_DIR of nxdi-deepseek shard")
    manifests = [Manifest.load_existing(part_folder(out_dir, part)) for part in parts]
    with Checkpoint(model_dir, read_model_config(manifests[0].config)) as checkpoint:
        checkpoint.check()
        for manifest in manifests:
            dtype, stored = model_dtype(manifest.dtype), checkpoint.reader
            form = weight_form(manifest.weights)
            plan = ShardPlan(checkpoint.config, manifest.tp_degree, dtype, out_dir, manifest.part, stored, form)
            check = _PartCheck(plan, manifest, checkpoint.reader)
            with closing(check.execute(sample, jobs)) as steps:
                for done, total in steps:
                    if progress:
                        progress(done, total)
            files, compared = files + len(check.ranks), compared + done
    return VerifySummary(files, compared, time.monotonic() - start)


class _PartCheck:
    """The rank files that the manifest of a part names."""

    def __init__(self, plan: ShardPlan, manifest: Manifest, reader: CheckpointReader):
        self._plan, self._manifest, self._reader = plan, manifest, reader
        self.ranks = sorted(manifest.checksums)
        self._files = {rank: plan.file(rank) for rank in self.ranks}
        self._problems: dict[str, None] = {}  # in order, each once

    def execute(self, sample: float, jobs: int) -> Iterator[tuple[int, int]]:
        """Yields (bytes compared, bytes to compare); raises CheckpointError in the end."""
        with opened({rank: file.path for rank, file in self._files.items()}) as descriptors:
            for rank in self.ranks:
                self._check_head(rank, descriptors[rank])
            report_problems(f"{self._plan.folder}: not the files of this checkpoint", list(self._problems))
            yield from self._compare(self._sample(sample), descriptors, jobs)
        report_problems(f"{self._plan.folder}: differs from the checkpoint", list(self._problems))

    def _sample(self, sample: float) -> list[int]:
        count = len(self._plan.units)
        return sorted(random.sample(range(count), max(1, round(sample * count))))

    def _check_head(self, rank: int, descriptor: int) -> None:
        """Size, header and rank tensors."""
        file = self._files[rank]
        if os.fstat(descriptor).st_size != file.size or _read(file.path, descriptor, 0, len(file.head)) != file.head:
            self._problems[f"{file.path}: another size or header"] = None
            return
        for name in self._plan.rank_tensors:
            if _read(file.path, descriptor, file.entries[name].offset, 4) != rank_value(rank).tobytes():
                self._problems[f"{file.path}: {name}: is not {rank}"] = None

    def _compare(self, indices: list[int], descriptors: dict[int, int], jobs: int) -> Iterator[tuple[int, int]]:
        plan = self._plan
        decoder = UnitDecoder(self._reader, plan.config, plan.dtype, plan.tp_degree, self.ranks)
        digests = np.zeros((len(plan.units), len(self.ranks)), np.uint64)

        def compare(i: int) -> int:
            unit = plan.units[i]
            for made in decoder.regions(unit):
                placed = list(plan.placed(unit, made))
                for rank in made.ranks:
                    stored = [self._differing(rank, descriptors[rank], *piece) for piece in placed]
                    digests[i, self.ranks.index(rank)] = digest(*stored)
            return i

        done, total = 0, sum(plan.unit_output_bytes(i, self.ranks) for i in indices)
        for i in run_threads(indices, compare, min(jobs, decoder.affordable_jobs(plan.units))):
            done += plan.unit_output_bytes(i, self.ranks)
            yield done, total
        if len(indices) == len(plan.units):
            self._check_checksums(digests)

    def _differing(self, rank: int, descriptor: int, name: str, offset: int, bits: np.ndarray) -> bytes:
        """What the file holds in the place of `bits`; notes where that is something else."""
        file = self._files[rank]
        stored = _read(file.path, descriptor, file.entries[name].offset + offset, bits.nbytes)
        if stored != bits.tobytes():
            self._problems[f"{file.path}: {name}"] = None
        return stored

    def _check_checksums(self, digests: np.ndarray) -> None:
        for column, rank in enumerate(self.ranks):
            for name, units in self._plan.units_of_tensors(rank).items():
                if self._manifest.checksums[rank].get(name) != tensor_checksum(digests[units, column]):
                    self._problems[f"{self._files[rank].path}: {name}: not the checksum of the manifest"] = None


@contextmanager
def opened(paths: dict[int, Path]) -> Iterator[dict[int, int]]:
    """File descriptors for reading. Raises CheckpointError naming all files that are missing."""
    report_problems("rank files are missing", [f"{path}: missing" for path in paths.values() if not path.exists()])
    with ExitStack() as stack:
        descriptors = {}
        for rank, path in paths.items():
            try:
                descriptors[rank] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
            stack.callback(os.close, descriptors[rank])
        yield descriptors


def _read(path: Path, descriptor: int, offset: int, size: int) -> bytes:
    buffer = np.empty(size, np.uint8)
    pread_into(descriptor, buffer, offset, str(path))
    return buffer.tobytes()
