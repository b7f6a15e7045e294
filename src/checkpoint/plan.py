"""What sharding a checkpoint makes: parts of the model, their files, and where each unit's regions go in them."""

import re
from collections.abc import Collection, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..dtypes import model_dtype, to_safetensors
from ..errors import CheckpointError, ConfigError
from ..model_config import ModelConfig
from .header import TensorEntry, build_header
from .layout import model_layout, mtp_layout, rank_tensor_names, stores_mtp
from .planned_file import PlannedFile
from .units import Region, Unit, plan_units

if TYPE_CHECKING:
    from .folder import Checkpoint

MODEL, MTP = "model", "mtp"
# Below the output folder; `weights` is where NxDI's load() looks.
_FOLDERS = {MODEL: "weights", MTP: "mtp/weights"}
_RANKS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


class ShardPlan:
    """One part of a model (`model` or `mtp`) cut for `tp_degree` ranks in `dtype`.

    stored: the names of the checkpoint's tensors, see layout.mtp_layout; None where there is no checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp_degree: int,
        dtype: torch.dtype,
        out_dir: str | Path,
        part: str = MODEL,
        stored: Container[str] | None = None,
    ):
        config.check_tensor_parallel(tp_degree)
        self.config, self.tp_degree, self.dtype, self.part = config, tp_degree, dtype, part
        self.folder = part_folder(out_dir, part)
        layers = config.mtp_layers if part == MTP else None
        if part == MTP and not layers:
            raise ConfigError("config.json: num_nextn_predict_layers is 0: the checkpoint has no MTP layer to write")
        if part == MTP and stored is not None and not stores_mtp(config, stored):
            raise CheckpointError(
                f"config.json: num_nextn_predict_layers is {len(layers)}, but the checkpoint has no tensors of an MTP "
                f"layer {layers[0]}; leave --with-mtp out"
            )
        self.specs = list(mtp_layout(config, stored) if part == MTP else model_layout(config))
        self.rank_tensors = list(rank_tensor_names(config, layers))

    @cached_property
    def units(self) -> list[Unit]:
        return list(plan_units(self.specs))

    def file(self, rank: int) -> PlannedFile:
        """The file of a rank as NxDI's ModelBuilder.shard_checkpoint writes it."""
        return PlannedFile(self.folder / file_name(rank), *self._header)

    @property
    def file_bytes(self) -> int:
        return self.file(0).size

    @cached_property
    def _header(self) -> tuple[bytes, dict[str, TensorEntry]]:
        return build_header(self._rank_file_tensors())

    def _rank_file_tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for spec in self.specs:
            yield spec.name, to_safetensors(spec.dtype(self.dtype)), spec.rank_shape(self.tp_degree)
        for name in self.rank_tensors:
            yield name, "I32", (1,)

    def region_offset(self, unit: Unit, region: Region) -> int:
        """Bytes from the start of the tensor in a rank's file."""
        _, rows, columns = unit.spec.grid.rank_shape(self.tp_degree)
        return (unit.expert * rows + region.start) * columns * unit.spec.dtype(self.dtype).itemsize

    def unit_output_bytes(self, i: int, ranks: Sequence[int]) -> int:
        """Bytes of unit i in the files of `ranks`, all together."""
        unit = self.units[i]
        regions = (unit.region(rank, self.tp_degree) for rank in ranks)
        elements = sum((region.stop - region.start) * region.columns for region in regions if region)
        return elements * unit.spec.dtype(self.dtype).itemsize

    def units_of_tensors(self, rank: int) -> dict[str, list[int]]:
        """The units that make up a rank's part of each tensor, in order."""
        indices: dict[str, list[int]] = {}
        for i, unit in enumerate(self.units):
            if unit.spec.grid.axis != 1 or unit.region(rank, self.tp_degree):
                indices.setdefault(unit.spec.name, []).append(i)
        return indices


def make_plans(
    checkpoint: "Checkpoint", out_dir: str | Path, tp_degree: int, dtype: str, with_mtp: bool = False
) -> list[ShardPlan]:
    """The parts to write. Raises ConfigError for a degree or dtype that cannot be, CheckpointError for what is wrong
    with the checkpoint."""
    checkpoint.config.check_tensor_parallel(tp_degree)
    torch_dtype = model_dtype(dtype)
    checkpoint.check()
    parts = [MODEL, MTP] if with_mtp else [MODEL]
    return [ShardPlan(checkpoint.config, tp_degree, torch_dtype, out_dir, part, checkpoint.reader) for part in parts]


def part_folder(out_dir: str | Path, part: str) -> Path:
    return Path(out_dir) / _FOLDERS[part]


def file_name(rank: int) -> str:
    return f"tp{rank}_sharded_checkpoint.safetensors"


def parse_ranks(text: str | None, tp_degree: int) -> Sequence[int]:
    """`0-7,32` as a list; all ranks for None. Raises ConfigError when it names a rank that does not exist."""
    if text is None:
        return range(tp_degree)
    ranks: set[int] = set()
    for word in text.split(","):
        match = _RANKS.fullmatch(word.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"--ranks {text!r}: give numbers and ranges, for example 0-7,32")
        check_ranks((first, last), tp_degree)
        ranks.update(range(first, last + 1))
    return sorted(ranks)


def check_ranks(ranks: Collection[int], tp_degree: int) -> list[int]:
    if not ranks or min(ranks) < 0 or max(ranks) >= tp_degree:
        raise ConfigError(f"ranks {sorted(ranks)} are not all in 0..{tp_degree - 1}, those of tp_degree {tp_degree}")
    return sorted(set(ranks))
