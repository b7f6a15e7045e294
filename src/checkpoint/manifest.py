"""The manifest beside the rank files: from what they were made, and checksums to tell a damaged copy.

The checksum of a tensor is the XXH3-64 of the XXH3-64 digests (8 bytes each, big endian) of its regions, in order.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..dtypes import MODEL_DTYPES
from ..errors import CheckpointError
from .files import write_json
from .plan import MODEL, MTP, ShardPlan, file_name

MANIFEST_FILE = "manifest.json"
_FORMAT = 2
_MAX_RANKS = 1 << 16
_FILE_NAME = re.compile(file_name(0).replace("0", "([0-9]{1,5})", 1).replace(".", r"\."))


def digest(data: bytes | np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(data)


def tensor_checksum(digests: np.ndarray) -> str:
    """From the digests of a tensor's regions, uint64 [n]."""
    return xxhash.xxh3_64_hexdigest(digests.astype(">u8").tobytes())


@dataclass
class Manifest:
    """source: the checkpoint's shards, see CheckpointReader.identity. config: the config.json that the files were made
    with. checksums: rank -> tensor name -> checksum."""

    part: str
    tp_degree: int
    dtype: str
    source: dict[str, list[int | str]]
    config: dict[str, Any]
    checksums: dict[int, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, plan: ShardPlan, source: dict[str, list[int | str]], config: dict[str, Any]) -> "Manifest":
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
                raise CheckpointError(
                    f"{path}: written by another version of nxdi-deepseek; use that one, or shard into another folder"
                )
            checksums = {int(_FILE_NAME.fullmatch(file)[1]): found for file, found in fields.pop("xxh3_64").items()}
            manifest = cls(**fields, checksums=checksums)
            manifest._check_types()
            return manifest
        except FileNotFoundError:
            return None
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error!r}); shard the checkpoint again") from None

    def _check_types(self) -> None:
        """Raises ValueError for a field that is not what `save` writes."""
        checks = {
            "part": self.part in (MODEL, MTP),
            "tp_degree": type(self.tp_degree) is int and 1 <= self.tp_degree <= _MAX_RANKS,
            "dtype": self.dtype in MODEL_DTYPES,
            "source": isinstance(self.source, dict),
            "config": isinstance(self.config, dict),
            "xxh3_64": all(isinstance(found, dict) for found in self.checksums.values()),
        }
        checks["rank"] = checks["tp_degree"] and all(rank < self.tp_degree for rank in self.checksums)
        wrong = [name for name, right in checks.items() if not right]
        if wrong:
            raise ValueError(f"wrong {', '.join(wrong)}")

    @classmethod
    def load_existing(cls, folder: Path) -> "Manifest":
        """As load; raises CheckpointError where there is none."""
        manifest = cls.load(folder)
        if manifest is None or not manifest.checksums:
            raise CheckpointError(
                f"{folder / MANIFEST_FILE}: missing; give the OUT_DIR of a finished nxdi-deepseek shard"
            )
        return manifest
