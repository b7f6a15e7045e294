"""The manifest beside the rank files: from what they were made, and checksums to tell a damaged copy.

The checksum of a tensor is the XXH3-64 of the XXH3-64 digests (8 bytes each, big endian) of its regions, in order.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import CheckpointError
from .files import write_json
from .plan import ShardPlan, file_name

MANIFEST_FILE = "manifest.json"
_FORMAT = 1


def digest(data: bytes | np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(data)


def tensor_checksum(digests: np.ndarray) -> str:
    """From the digests of a tensor's regions, uint64 [n]."""
    return xxhash.xxh3_64_hexdigest(digests.astype(">u8").tobytes())


@dataclass
class Manifest:
    """checksums: rank -> tensor name -> checksum. source: size and time of change of each shard of the checkpoint."""

    part: str
    tp_degree: int
    dtype: str
    source: dict[str, list[int]]
    config: dict[str, Any]
    checksums: dict[int, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, plan: ShardPlan, source: dict[str, list[int]], config: dict[str, Any]) -> "Manifest":
        return cls(plan.part, plan.tp_degree, str(plan.dtype).removeprefix("torch."), source, config)

    @property
    def identity(self) -> dict[str, Any]:
        """What rank files must agree in to lie in one folder."""
        return {
            "part": self.part,
            "tp_degree": self.tp_degree,
            "dtype": self.dtype,
            "source": self.source,
            "config": self.config,
        }

    def save(self, folder: Path) -> None:
        checksums = {file_name(rank): self.checksums[rank] for rank in sorted(self.checksums)}
        write_json(folder / MANIFEST_FILE, {"format": _FORMAT, **self.identity, "xxh3_64": checksums})

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """None where there is no manifest. Raises CheckpointError for one that cannot be read."""
        path = folder / MANIFEST_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("format") != _FORMAT:
                raise CheckpointError(f"{path}: written by another version of nxdi-deepseek; use that one")
            ranks = {file_name(rank): rank for rank in range(fields["tp_degree"])}
            checksums = {ranks[file]: tensors for file, tensors in fields.pop("xxh3_64").items()}
            return cls(**fields, checksums=checksums)
        except FileNotFoundError:
            return None
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error!r}); shard the checkpoint again") from None

    @classmethod
    def load_existing(cls, folder: Path) -> "Manifest":
        """As load; raises CheckpointError where there is none."""
        manifest = cls.load(folder)
        if manifest is None or not manifest.checksums:
            raise CheckpointError(
                f"{folder / MANIFEST_FILE}: missing; give the OUT_DIR of a finished nxdi-deepseek shard"
            )
        return manifest
