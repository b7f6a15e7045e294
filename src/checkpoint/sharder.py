"""Shards a checkpoint into one file per rank: bounded memory, all cores, resumable, nothing half-written."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..model_config import ModelConfig
from .decoder import UnitDecoder
from .files import locked_folder, sync_folder
from .folder import Checkpoint
from .journal import Journal
from .manifest import Manifest, digest, tensor_checksum
from .parallel import run_threads, thread_count
from .plan import ShardPlan, check_ranks, make_plans
from .planned_file import check_space

JOURNAL_FILE = "unfinished.jsonl"
# What is finished is made durable and noted this often: as much work as a crash can cost.
SYNC_SECONDS = 20.0


@dataclass(frozen=True)
class ShardSummary:
    """Of one run: files and bytes written, seconds, bytes that an earlier run had written already. errors: relative
    error of each FP8 tensor, over all ranks that are written, see Manifest.error_of."""

    folders: tuple[Path, ...]
    files: int
    bytes: int
    resumed: int
    seconds: float
    errors: dict[str, float]


def shard_checkpoint(
    model_dir: str | Path,
    out_dir: str | Path,
    tp_degree: int,
    dtype: str = "bfloat16",
    ranks: Sequence[int] | None = None,
    jobs: int | None = None,
    resume: bool = False,
    with_mtp: bool = False,
    progress: Callable[[int, int], None] | None = None,
    config: ModelConfig | None = None,
    weights: str = "bf16",
    fused: bool = False,
) -> ShardSummary:
    """Writes OUT_DIR/weights/tp{rank}_sharded_checkpoint.safetensors, the files of NxDI's own sharding.

    dtype: "bfloat16" or "float32". ranks: all if not given. jobs: threads, one per core if not given. resume: keep what
    an interrupted run finished, and files that are complete; the checkpoint may have been copied since then, and is
    known again by its content (CheckpointReader.identity). with_mtp: write the MTP layers to OUT_DIR/mtp/weights too.
    progress is called as progress(done_bytes, total_bytes) after each piece of work, in the calling thread; what an
    earlier run did is among the bytes that are done. config: another one than config.json's, for example of a model
    with fewer layers. weights: the form of the routed experts, a name of weight_forms.FORMS. fused: for speculation,
    the draft beside the model, under the names of NxDI's fused models.

    Raises ConfigError or CheckpointError. What is wrong with the checkpoint is told before any file is written, except
    NaN and infinity in large weights; so is a disk that is too small. What was finished is kept for `resume`.
    """
    start, jobs = time.monotonic(), thread_count(jobs)
    with Checkpoint(model_dir, config) as checkpoint, ExitStack() as locks:
        plans = make_plans(checkpoint, out_dir, tp_degree, dtype, with_mtp, weights, fused)
        ranks = check_ranks(range(tp_degree) if ranks is None else ranks, tp_degree)
        for plan in plans:
            locks.enter_context(locked_folder(plan.folder))
        runs = [_PartRun(plan, checkpoint, ranks, resume) for plan in plans]
        remedy = "free some, or write some ranks elsewhere with --ranks"
        check_space([file for run in runs for file in run.files.values()], remedy)
        total = sum(run.total for run in runs)
        for run in runs:
            with closing(run.execute(jobs)) as steps:
                for _ in steps:
                    if progress:
                        progress(sum(run.done for run in runs), total)
    resumed = sum(run.resumed for run in runs)
    folders = tuple(plan.folder for plan in plans)
    files = sum(len(run.pending) for run in runs)
    errors = {name: error for run in runs for name, error in run.errors().items()}
    return ShardSummary(folders, files, total - resumed, resumed, time.monotonic() - start, errors)


class _PartRun:
    """Sharding one part of the model into the ranks' files that are not complete yet (`pending`).

    files: these, by rank. total, done and resumed (done by an earlier run) count bytes of these files.
    """

    def __init__(self, plan: ShardPlan, checkpoint: Checkpoint, ranks: list[int], resume: bool):
        self._plan, self._reader, self._resume = plan, checkpoint.reader, resume
        self._manifest = Manifest.of_plan(plan, checkpoint.reader.identity(), checkpoint.fields)
        self._take_over_manifest()
        self.pending = [rank for rank in ranks if not self._is_complete(rank)]
        self.files = {rank: plan.file(rank) for rank in self.pending}
        self.total = plan.file_bytes * len(self.pending)
        self.done = self.resumed = 0

    def execute(self, jobs: int) -> Iterator[None]:
        """Does the work, and lets the caller look in after every unit."""
        if not self.pending:
            # A run that was stopped after its last file got its name may have left the journal.
            (self._plan.folder / JOURNAL_FILE).unlink(missing_ok=True)
            return
        try:
            journal = self._open_files()
            yield from self._write_units(journal, jobs)
            self._finish(journal)
            self.done = self.total
            yield
        finally:
            for file in self.files.values():
                file.close()

    def errors(self) -> dict[str, float]:
        """Relative error of each FP8 tensor."""
        return {spec.name: self._manifest.error_of(spec.name) for spec in self._plan.specs if spec.scale}

    def _take_over_manifest(self) -> None:
        found = Manifest.load(self._plan.folder)
        if found is None:
            return
        differing = [key for key, value in self._manifest.identity.items() if found.identity[key] != value]
        if differing:
            raise CheckpointError(
                f"{self._plan.folder}: holds rank files of another {', '.join(differing)}; choose another folder"
            )
        self._manifest.checksums, self._manifest.errors = found.checksums, found.errors

    def _is_complete(self, rank: int) -> bool:
        path = self._plan.file(rank).path
        if not path.exists():
            return False
        if not self._resume:
            raise CheckpointError(f"{path}: exists; add --resume to keep what is complete, or choose another folder")
        if rank not in self._manifest.checksums or path.stat().st_size != self._plan.file_bytes:
            raise CheckpointError(f"{path}: not a complete file of this sharding; remove it")
        return True

    def _open_files(self) -> Journal:
        """New files, or those of the unfinished run."""
        folder, files = self._plan.folder, list(self.files.values())
        journal = Journal(folder / JOURNAL_FILE, self._manifest.identity, len(self._plan.units), self.pending)
        if self._resume and journal.path.exists():
            journal.load()
            unfinished = [rank for rank in journal.ranks if not self._plan.file(rank).path.exists()]
            if unfinished != self.pending:
                raise CheckpointError(f"{folder}: the unfinished run was for ranks {journal.ranks}; resume with those")
            if not all(file.reopen() for file in files):
                raise CheckpointError(f"{folder}: files of the unfinished run are gone; run without --resume")
            self.resumed = self.done = sum(self._unit_bytes(i) for i in np.flatnonzero(journal.done))
            return journal
        for rank, file in self.files.items():
            file.create()
            for name in self._plan.rank_tensors:
                file.write(name, rank_value(rank))
        journal.create()
        return journal

    def _write_units(self, journal: Journal, jobs: int) -> Iterator[None]:
        plan, columns = self._plan, {rank: journal.ranks.index(rank) for rank in self.pending}
        decoder = UnitDecoder(self._reader, plan.config, plan.dtype, plan.tp_degree, self.pending)

        def write(i: int) -> int:
            unit = plan.units[i]
            for made in decoder.regions(unit):
                placed = list(plan.placed(unit, made))
                checksum = digest(*(bits for _, _, bits in placed))
                for rank in made.ranks:
                    for name, offset, bits in placed:
                        self.files[rank].write(name, bits, offset)
                    journal.digests[i, columns[rank]] = checksum
                    if made.sums is not None:
                        journal.sums[i, columns[rank]] = made.sums
            return i

        finished, synced = [], time.monotonic()
        try:
            todo = iter(np.flatnonzero(~journal.done).tolist())
            for i in run_threads(todo, write, min(jobs, decoder.affordable_jobs(plan.units))):
                finished.append(i)
                self.done += self._unit_bytes(i)
                if time.monotonic() - synced > SYNC_SECONDS:
                    self._sync(journal, finished)
                    finished, synced = [], time.monotonic()
                yield
        finally:
            self._sync(journal, finished)

    def _sync(self, journal: Journal, finished: list[int]) -> None:
        self._reader.check_unchanged()
        for file in self.files.values():
            file.sync()
        journal.append(finished)

    def _finish(self, journal: Journal) -> None:
        """Gives the files their names. The manifest knows of them before, and the journal until all have theirs."""
        for rank in self.pending:
            column = journal.ranks.index(rank)
            self._manifest.checksums[rank] = self._checksums(rank, journal.digests[:, column])
            if self._plan.form.is_fp8:
                self._manifest.errors[rank] = self._errors(rank, journal.sums[:, column])
        self._manifest.save(self._plan.folder)
        for file in self.files.values():
            file.commit()
        sync_folder(self._plan.folder)
        journal.path.unlink(missing_ok=True)
        sync_folder(self._plan.folder)

    def _checksums(self, rank: int, digests: np.ndarray) -> dict[str, str]:
        units = self._plan.units_of_tensors(rank)
        own = tensor_checksum(np.array([digest(rank_value(rank))], np.uint64))
        return {name: tensor_checksum(digests[i]) for name, i in units.items()} | dict.fromkeys(
            self._plan.rank_tensors, own
        )

    def _errors(self, rank: int, sums: np.ndarray) -> dict[str, list[float]]:
        scaled = {spec.name for spec in self._plan.specs if spec.scale}
        units = self._plan.units_of_tensors(rank)
        return {name: sums[i].sum(axis=0).tolist() for name, i in units.items() if name in scaled}

    def _unit_bytes(self, i: int) -> int:
        return self._plan.unit_output_bytes(i, self.pending)


def rank_value(rank: int) -> np.ndarray:
    """The content of a rank tensor."""
    return np.array([rank], np.int32)
