"""What sharding a checkpoint makes: parts of the model, their files, and where each unit's regions go in them."""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..dtypes import model_dtype, to_safetensors
from ..errors import ConfigError
from ..model_config import ModelConfig
from ..weight_forms import BF16, FP8_BLOCK, WeightForm, weight_form
from .copies import check_copies
from .header import TensorEntry, build_header
from .layout import in_form
from .parts import FUSED, MODEL, MTP, part_layout, part_rank_tensors
from .planned_file import PlannedFile
from .source import TensorSource
from .stored import stored_weight, weight_block_size
from .units import Region, Unit, plan_units

if TYPE_CHECKING:
    from .decoder import Decoded
    from .folder import Checkpoint

# Below the output folder; `weights` is where NxDI's load() looks.
_FOLDERS = {MODEL: "weights", FUSED: "weights", MTP: "mtp/weights"}
_RANKS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


class ShardPlan:
    """One part of a checkpoint (parts.py) cut for `tp_degree` ranks in `dtype`, its routed experts in `form`.

    stored: the checkpoint's tensors; None where there is no checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp_degree: int,
        dtype: torch.dtype,
        out_dir: str | Path,
        part: str = MODEL,
        stored: TensorSource | None = None,
        form: WeightForm = BF16,
    ):
        form.check(config, tp_degree)
        self.config, self.tp_degree, self.dtype, self.part, self.form = config, tp_degree, dtype, part, form
        self.folder, self._stored = part_folder(out_dir, part), stored
        self.specs = list(in_form(part_layout(config, part, stored), form, config, tp_degree))
        self.rank_tensors = part_rank_tensors(config, part)

    @cached_property
    def kept_blocks(self) -> list[int] | None:
        """The blocks of the checkpoint's experts, where the form keeps all of their codes and scales."""
        if self.form is not FP8_BLOCK or self._stored is None:
            return None
        sources = [source for spec in self.specs if spec.scale for source in spec.sources]
        blocks = {stored_weight(self._stored, source.name, source.shape, self.config).block for source in sources}
        return list(weight_block_size(self.config)) if blocks == {weight_block_size(self.config)} else None

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
            for name, dtype, shape in spec.rank_tensors(self.dtype, self.tp_degree):
                yield name, to_safetensors(dtype), shape
        for name in self.rank_tensors:
            yield name, "I32", (1,)

    def region_offset(self, unit: Unit, region: Region) -> int:
        """Bytes from the start of the tensor in a rank's file."""
        _, rows, columns = unit.spec.grid.rank_shape(self.tp_degree)
        return (unit.expert * rows + region.start) * columns * unit.spec.dtype(self.dtype).itemsize

    def scale_offset(self, unit: Unit) -> int:
        """The same for the scale, of which a unit makes all that an expert has."""
        return unit.expert * self._scale_bytes(unit)

    def _scale_bytes(self, unit: Unit) -> int:
        return 4 * prod(unit.spec.scale.rank_shape(self.tp_degree)[1:]) if unit.spec.scale else 0

    def placed(self, unit: Unit, made: "Decoded") -> Iterator[tuple[str, int, np.ndarray]]:
        """(tensor, offset in it, bits) of what a unit makes for a rank."""
        yield unit.spec.name, self.region_offset(unit, made.region), made.bits
        if made.scale is not None:
            yield unit.spec.scale_name, self.scale_offset(unit), made.scale

    def unit_output_bytes(self, i: int, ranks: Sequence[int]) -> int:
        """Bytes of unit i in the files of `ranks`, all together."""
        unit = self.units[i]
        regions = [region for rank in ranks if (region := unit.region(rank, self.tp_degree))]
        elements = sum((region.stop - region.start) * region.columns for region in regions)
        return elements * unit.spec.dtype(self.dtype).itemsize + len(regions) * self._scale_bytes(unit)

    def units_of_tensors(self, rank: int) -> dict[str, list[int]]:
        """The units that make up a rank's part of each tensor, in order."""
        indices: dict[str, list[int]] = {}
        for i, unit in enumerate(self.units):
            if unit.spec.grid.axis != 1 or unit.region(rank, self.tp_degree):
                indices.setdefault(unit.spec.name, []).append(i)
        return indices


def make_plans(
    checkpoint: "Checkpoint",
    out_dir: str | Path,
    tp_degree: int,
    dtype: str,
    with_mtp: bool = False,
    weights: str = "bf16",
    fused: bool = False,
) -> list[ShardPlan]:
    """The parts to write: the model (with `fused` the draft beside it), and the MTP layers with `with_mtp`. Raises
    ConfigError for a degree, dtype or form of weights that cannot be, CheckpointError for what is wrong with the
    checkpoint."""
    config, form = checkpoint.config, weight_form(weights)
    form.check(config, tp_degree)
    torch_dtype = model_dtype(dtype)
    checkpoint.check()
    parts = [FUSED if fused else MODEL, *([MTP] if with_mtp else [])]
    if fused:
        part_layout(config, FUSED, checkpoint.reader)
        check_copies(checkpoint.reader, config)
    return [ShardPlan(config, tp_degree, torch_dtype, out_dir, part, checkpoint.reader, form) for part in parts]


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
