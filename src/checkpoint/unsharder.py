"""The way back: rank files become a Hugging Face checkpoint, with its names and shapes, no longer in FP8."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from ..dtypes import model_dtype, to_safetensors
from ..errors import CheckpointError
from ..model_config import read_model_config
from .encodings import BITS
from .files import locked_folder, pread_into, sync_folder, write_json
from .header import build_header
from .layout import Source
from .manifest import Manifest
from .parallel import run_threads, thread_count
from .plan import MODEL, MTP, ShardPlan, part_folder
from .planned_file import PlannedFile, check_space
from .reader import INDEX_FILE
from .units import Unit
from .verifier import opened

_FILE_BYTES = 5_000_000_000


def unshard(
    out_dir: str | Path,
    model_dir: str | Path,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes MODEL_DIR from all rank files of `out_dir` (and of the MTP layers, where they are). Returns its bytes.

    Weights keep the dtype of the rank files; config.json loses its quantization. Raises CheckpointError when a rank
    file is missing or `model_dir` holds a checkpoint.
    """
    model_dir, jobs = Path(model_dir), thread_count(jobs)
    if (model_dir / INDEX_FILE).exists():
        raise CheckpointError(f"{model_dir / INDEX_FILE}: exists; choose another folder")
    manifest = Manifest.load_existing(part_folder(out_dir, MODEL))
    fields = {key: value for key, value in manifest.config.items() if key != "quantization_config"}
    fields["torch_dtype"] = manifest.dtype
    plans = [_plan(manifest, out_dir)]
    if part_folder(out_dir, MTP).exists():
        plans.append(_plan(Manifest.load_existing(part_folder(out_dir, MTP)), out_dir))
    else:
        fields["num_nextn_predict_layers"] = 0
    with locked_folder(model_dir):
        output = _ModelFiles(model_dir, plans)
        done = 0
        try:
            output.create()
            for plan in plans:
                with closing(_copy_units(plan, output, jobs)) as steps:
                    for size in steps:
                        done += size
                        if progress:
                            progress(done, output.total)
            output.commit()
        finally:
            output.close()
        write_json(model_dir / "config.json", fields)
        write_json(model_dir / INDEX_FILE, {"metadata": {"total_size": output.total}, "weight_map": output.weight_map})
    return output.total


def _plan(manifest: Manifest, out_dir: str | Path) -> ShardPlan:
    missing = sorted(set(range(manifest.tp_degree)) - set(manifest.checksums))
    if missing:
        raise CheckpointError(f"{out_dir}: ranks {missing} were not written; shard them first")
    config = read_model_config(manifest.config)
    return ShardPlan(config, manifest.tp_degree, model_dtype(manifest.dtype), out_dir, manifest.part)


class _ModelFiles:
    """The shards of the new checkpoint. total: bytes of tensors. weight_map: tensor -> file."""

    def __init__(self, model_dir: Path, plans: list[ShardPlan]):
        self._folder = model_dir
        tensors = {
            source.name: (source.name, to_safetensors(spec.dtype(plan.dtype)), source.shape)
            for plan in plans
            for spec in plan.specs
            for source in spec.sources
        }
        parts = list(_split(list(tensors.values())))
        self._files = {}
        for i, part in enumerate(parts, start=1):
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
            planned = PlannedFile(model_dir / file, *build_header(part, {"format": "pt"}))
            self._files.update((name, planned) for name, _, _ in part)
        self._planned = list(dict.fromkeys(self._files.values()))
        self.total = sum(file.size - len(file.head) for file in self._planned)
        self.weight_map = {name: file.path.name for name, file in sorted(self._files.items())}

    def create(self) -> None:
        check_space(self._planned, "free some, or choose another folder")
        for file in self._planned:
            file.create()

    def write_rows(self, source: Source, row: int, bits: np.ndarray) -> None:
        file = self._files[source.name]
        file.write(source.name, bits, row * file.entries[source.name].row_bytes)

    def commit(self) -> None:
        for file in self._planned:
            file.commit()
        sync_folder(self._folder)

    def close(self) -> None:
        for file in self._planned:
            file.close()


def _split(tensors: list[tuple[str, str, tuple[int, ...]]]) -> Iterator[list[tuple[str, str, tuple[int, ...]]]]:
    """Groups of at most _FILE_BYTES, or of one tensor."""
    part, size = [], 0
    for tensor in tensors:
        nbytes = next(iter(build_header([tensor])[1].values())).nbytes
        if part and size + nbytes > _FILE_BYTES:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += nbytes
    yield part


def _copy_units(plan: ShardPlan, output: _ModelFiles, jobs: int) -> Iterator[int]:
    """Copies all of a part; yields the bytes written after each unit. A source used twice is written once."""
    owners: dict[str, str] = {}
    for spec in plan.specs:
        owners.setdefault(spec.sources[0].name, spec.name)
    units = [unit for unit in plan.units if owners[unit.spec.sources[0].name] == unit.spec.name]
    files = {rank: plan.file(rank) for rank in range(plan.tp_degree)}
    with opened({rank: file.path for rank, file in files.items()}) as descriptors:
        for rank, file in files.items():
            if os.fstat(descriptors[rank]).st_size != file.size:
                raise CheckpointError(
                    f"{file.path}: not the size that the manifest implies; shard the checkpoint again"
                )

        def copy(unit: Unit) -> int:
            rows = _gather(plan, unit, files, descriptors)
            for source, row, bits in rows:
                output.write_rows(source, row, bits)
            return sum(bits.nbytes for _, _, bits in rows)

        yield from run_threads(units, copy, jobs)


def _gather(
    plan: ShardPlan, unit: Unit, files: dict[int, PlannedFile], descriptors: dict[int, int]
) -> list[tuple[Source, int, np.ndarray]]:
    """The rows of the sources that a unit covers, from the regions of all ranks: (source, first row, bits)."""
    bits_dtype = BITS[unit.spec.dtype(plan.dtype)]
    grid, name = unit.spec.grid, unit.spec.name
    regions = {rank: unit.region(rank, plan.tp_degree) for rank in (files if grid.axis else [0])}
    regions = {rank: region for rank, region in regions.items() if region}
    covered: dict[int, list[int]] = {}
    for region in regions.values():
        for piece in region.pieces:
            first, last = covered.get(piece.block, piece.source[0])
            covered[piece.block] = [min(first, piece.source[0][0]), max(last, piece.source[0][1])]
    rows = {i: np.empty((stop - start, grid.blocks[i].columns), bits_dtype) for i, (start, stop) in covered.items()}
    for rank, region in regions.items():
        stored = np.empty((region.stop - region.start, region.columns), bits_dtype)
        offset = files[rank].entries[name].offset + plan.region_offset(unit, region)
        pread_into(descriptors[rank], stored.view(np.uint8).reshape(-1), offset, f"{files[rank].path}: {name}")
        for piece in region.pieces:
            (top, bottom), (left, right) = piece.target
            values = stored[top:bottom, left:right]
            (start, stop), columns = piece.source
            first = covered[piece.block][0]
            target = rows[piece.block][start - first : stop - first, slice(*columns)]
            target[...] = values.T if grid.blocks[piece.block].transposed else values
    return [(unit.sources()[i], covered[i][0], rows[i]) for i in sorted(rows)]
