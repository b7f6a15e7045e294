"""What sharding and loading take of the host: memory and disk."""

from dataclasses import dataclass

from ..checkpoint.parts import FUSED, MODEL
from ..model_config import ModelConfig
from .instances import GIB, Instance
from .rank_memory import CompiledShape
from .weight_parts import rank_file_bytes

# What `shard` was seen to stay below (README); NxDI's own sharding holds all ranks at once.
SHARDING_BYTES = 2 * GIB


@dataclass(frozen=True)
class HostNeeds:
    """Bytes. disk: rank files and, if its size is known, the checkpoint that they are made of. loading: NxDI's load()
    reads the files of all ranks into memory ahead of the first copy to a device. *_fits: None where the instance's
    size is not known."""

    rank_file: int
    rank_files: int
    checkpoint: int | None
    sharding: int
    loading: int
    loading_fits: bool | None
    disk: int
    disk_fits: bool | None


def host_needs(
    config: ModelConfig, shape: CompiledShape, instance: Instance, checkpoint: int | None = None
) -> HostNeeds:
    """checkpoint: bytes of the Hugging Face checkpoint, None if there is only a config.json."""
    part = FUSED if shape.speculation_length else MODEL
    rank_file = rank_file_bytes(config, shape.tp_degree, shape.dtype, shape.form, part)
    files = shape.tp_degree * rank_file
    disk = files + (checkpoint or 0)
    return HostNeeds(
        rank_file=rank_file,
        rank_files=files,
        checkpoint=checkpoint,
        sharding=SHARDING_BYTES,
        loading=files,
        loading_fits=_fits(files, instance.host_bytes),
        disk=disk,
        disk_fits=_fits(disk, instance.nvme_bytes),
    )


def _fits(needed: int, there: int | None) -> bool | None:
    return None if there is None else needed <= there
