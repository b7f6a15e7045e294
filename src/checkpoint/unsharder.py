"""The way back: rank files become a Hugging Face checkpoint, with its names and shapes. See restored.py for experts in
FP8; all else is written in the dtype of the rank files."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dtypes import model_dtype, to_safetensors
from ..errors import CheckpointError
from ..model_config import read_model_config
from ..weight_forms import weight_form
from .encodings import BITS
from .files import locked_folder, pread_into, sync_folder, write_json
from .fp8 import SCALE_SUFFIX
from .header import build_header
from .manifest import Manifest
from .parallel import run_threads, thread_count
from .parts import FUSED, MODEL, MTP
from .plan import ShardPlan, part_folder
from .planned_file import PlannedFile, check_space
from .reader import INDEX_FILE
from .restored import RestoredExperts, bits_dtype
from .units import Region, Unit
from .verifier import opened

_FILE_BYTES = 5_000_000_000


def unshard(
    out_dir: str | Path,
    model_dir: str | Path,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes MODEL_DIR from all rank files of `out_dir` (and of the MTP layers, where they are). Returns its bytes.

    Weights keep the dtype of the rank files, but see restored.py for experts in FP8; config.json says of quantization
    what is true then. Raises CheckpointError when a rank file is missing or `model_dir` holds a checkpoint.
    """
    model_dir, jobs = Path(model_dir), thread_count(jobs)
    if (model_dir / INDEX_FILE).exists():
        raise CheckpointError(f"{model_dir / INDEX_FILE}: exists; choose another folder")
    manifest = Manifest.load_existing(part_folder(out_dir, MODEL))
    fields = {key: value for key, value in manifest.config.items() if key != "quantization_config"}
    fields["torch_dtype"] = manifest.dtype
    parts = [_part(manifest, out_dir)]
    if parts[0].experts.keeps_fp8:
        fields["quantization_config"] = parts[0].experts.quantization_config()
    if part_folder(out_dir, MTP).exists():
        parts.append(_part(Manifest.load_existing(part_folder(out_dir, MTP)), out_dir))
    else:
        fields["num_nextn_predict_layers"] = 1 if manifest.part == FUSED else 0
    with locked_folder(model_dir):
        output = _ModelFiles(model_dir, parts)
        done = 0
        try:
            output.create()
            for part in parts:
                with closing(_copy_units(part, output, jobs)) as steps:
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


@dataclass(frozen=True)
class _Part:
    """A part of the model, and what becomes of its experts where they are FP8."""

    plan: ShardPlan
    experts: RestoredExperts


def _part(manifest: Manifest, out_dir: str | Path) -> _Part:
    missing = sorted(set(range(manifest.tp_degree)) - set(manifest.checksums))
    if missing:
        raise CheckpointError(f"{out_dir}: ranks {missing} were not written; shard them first")
    config = read_model_config(manifest.config)
    form = weight_form(manifest.weights)
    plan = ShardPlan(config, manifest.tp_degree, model_dtype(manifest.dtype), out_dir, manifest.part, form=form)
    return _Part(plan, RestoredExperts(plan, manifest))


class _ModelFiles:
    """The shards of the new checkpoint. total: bytes of tensors. weight_map: tensor -> file."""

    def __init__(self, model_dir: Path, parts: list[_Part]):
        self._folder = model_dir
        tensors = {tensor[0]: tensor for part in parts for tensor in _tensors(part)}
        groups = list(_split(list(tensors.values())))
        self._files = {}
        for i, group in enumerate(groups, start=1):
            file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            planned = PlannedFile(model_dir / file, *build_header(group, {"format": "pt"}))
            self._files.update((name, planned) for name, _, _ in group)
        self._planned = list(dict.fromkeys(self._files.values()))
        self.total = sum(file.size - len(file.head) for file in self._planned)
        self.weight_map = {name: file.path.name for name, file in sorted(self._files.items())}

    def create(self) -> None:
        check_space(self._planned, "free some, or choose another folder")
        for file in self._planned:
            file.create()

    def write_rows(self, name: str, row: int, bits: np.ndarray) -> None:
        file = self._files[name]
        file.write(name, bits, row * file.entries[name].row_bytes)

    def commit(self) -> None:
        for file in self._planned:
            file.commit()
        sync_folder(self._folder)

    def close(self) -> None:
        for file in self._planned:
            file.close()


def _tensors(part: _Part) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of all that is written of a part."""
    for spec in part.plan.specs:
        for source in spec.sources:
            if spec.scale:
                yield from part.experts.tensors(source)
            else:
                yield source.name, to_safetensors(spec.dtype(part.plan.dtype)), source.shape


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


def _copy_units(part: _Part, output: _ModelFiles, jobs: int) -> Iterator[int]:
    """Copies all of a part; yields the bytes written after each unit. A source used twice is written once."""
    plan = part.plan
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
            rows = _Gathering(part, unit).run(files, descriptors)
            for name, row, bits in rows:
                output.write_rows(name, row, bits)
            return sum(bits.nbytes for _, _, bits in rows)

        yield from run_threads(units, copy, jobs)


class _Gathering:
    """The rows of the sources that a unit covers, from the regions of all ranks."""

    def __init__(self, part: _Part, unit: Unit):
        plan, grid = part.plan, unit.spec.grid
        self._plan, self._unit, self._experts = plan, unit, part.experts
        regions = {rank: unit.region(rank, plan.tp_degree) for rank in range(plan.tp_degree if grid.axis else 1)}
        self._regions = {rank: region for rank, region in regions.items() if region}
        covered: dict[int, list[int]] = {}
        for piece in (piece for region in self._regions.values() for piece in region.pieces):
            first, last = covered.get(piece.block, piece.source[0])
            covered[piece.block] = [min(first, piece.source[0][0]), max(last, piece.source[0][1])]
        self._covered, dtype = covered, bits_dtype(plan, unit.spec, part.experts)
        self._rows = {
            i: np.empty((stop - start, grid.blocks[i].columns), dtype) for i, (start, stop) in covered.items()
        }
        self._scales: dict[int, np.ndarray] = {}
        if unit.spec.scale and part.experts.keeps_fp8:
            shapes = {i: list(part.experts.tensors(unit.sources()[i]))[1][2] for i in covered}
            self._scales = {i: np.empty(shape, np.float32) for i, shape in shapes.items()}

    def run(self, files: dict[int, PlannedFile], descriptors: dict[int, int]) -> list[tuple[str, int, np.ndarray]]:
        """(tensor, first row, bits) of all that is to be written."""
        for rank, region in self._regions.items():
            self._take(region, files[rank], descriptors[rank])
        names = {i: self._unit.sources()[i].name for i in sorted(self._rows)}
        written = [(name, self._covered[i][0], self._rows[i]) for i, name in names.items()]
        return written + [(names[i] + SCALE_SUFFIX, 0, scale) for i, scale in self._scales.items()]

    def _take(self, region: Region, file: PlannedFile, descriptor: int) -> None:
        """What one rank holds of the unit."""
        plan, unit, spec = self._plan, self._unit, self._unit.spec
        stored = np.empty((region.stop - region.start, region.columns), BITS[spec.dtype(plan.dtype)])
        _read(file, descriptor, spec.name, plan.region_offset(unit, region), stored)
        cells = None
        if spec.scale:
            cells = np.empty(spec.scale.rank_shape(plan.tp_degree)[1:], np.float32)
            _read(file, descriptor, spec.scale_name, plan.scale_offset(unit), cells)
            stored = self._experts.bits(stored, cells)
        for piece in region.pieces:
            (top, bottom), (left, right) = piece.target
            values = stored[top:bottom, left:right]
            (start, stop), columns = piece.source
            first = self._covered[piece.block][0]
            target = self._rows[piece.block][start - first : stop - first, slice(*columns)]
            target[...] = values.T if spec.grid.blocks[piece.block].transposed else values
            if self._scales:
                down, across = (stored.shape[axis] // cells.shape[axis] for axis in (0, 1))
                own = cells[top // down : bottom // down, left // across : right // across]
                self._experts.place_scale(piece, own, self._scales[piece.block])


def _read(file: PlannedFile, descriptor: int, name: str, offset: int, out: np.ndarray) -> None:
    offset += file.entries[name].offset
    pread_into(descriptor, out.view(np.uint8).reshape(-1), offset, f"{file.path}: {name}")
