"""The manifest beside the rank files: from what they were made, and checksums to tell a damaged copy.

The checksum of a tensor is the XXH3-64 of the XXH3-64 digests (8 bytes each, big endian) of its regions, in order. A
region of FP8 weights is their codes, and behind them their scales: scales have no checksum of their own.
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
from ..weight_forms import FORMS
from .files import write_json
from .parts import FUSED, MODEL, MTP
from .plan import ShardPlan, file_name

MANIFEST_FILE = "manifest.json"
_FORMAT = 2
_MAX_RANKS = 1 << 16
_FILE_NAME = re.compile(file_name(0).replace("0", "([0-9]{1,5})", 1).replace(".", r"\."))


def digest(*data: bytes | np.ndarray) -> int:
    """Of the pieces one behind the other."""
    state = xxhash.xxh3_64()
    for piece in data:
        state.update(piece)
    return state.intdigest()


def tensor_checksum(digests: np.ndarray) -> str:
    """From the digests of a tensor's regions, uint64 [n]."""
    return xxhash.xxh3_64_hexdigest(digests.astype(">u8").tobytes())


@dataclass
class Manifest:
    """source: the checkpoint's shards, see CheckpointReader.identity. config: the config.json that the files were made
    with. weights: the form of the routed experts. blocks: rows and columns of the checkpoint's FP8 blocks, where all of
    their codes and scales are kept. checksums: rank -> tensor name -> checksum. errors: rank -> FP8 tensor
    -> [sum of squares of its weights, sum of squares of what FP8 makes wrong in them]."""

    part: str
    tp_degree: int
    dtype: str
    source: dict[str, list[int | str]]
    config: dict[str, Any]
    weights: str = "bf16"
    blocks: list[int] | None = None
    checksums: dict[int, dict[str, str]] = field(default_factory=dict)
    errors: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, plan: ShardPlan, source: dict[str, list[int | str]], config: dict[str, Any]) -> "Manifest":
        dtype = str(plan.dtype).removeprefix("torch.")
        return cls(plan.part, plan.tp_degree, dtype, source, config, plan.form.name, plan.kept_blocks)

    @property
    def identity(self) -> dict[str, Any]:
        """What rank files must agree in to lie in one folder."""
        return {
            "part": self.part,
            "tp_degree": self.tp_degree,
            "dtype": self.dtype,
            "weights": self.weights,
            "blocks": self.blocks,
            "source": self.source,
            "config": self.config,
        }

    def save(self, folder: Path) -> None:
        found = {
            key: {file_name(rank): ranks[rank] for rank in sorted(ranks)}
            for key, ranks in (("xxh3_64", self.checksums), ("fp8_errors", self.errors))
            if ranks
        }
        write_json(folder / MANIFEST_FILE, {"format": _FORMAT, **self.identity, **found})

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
            checksums, errors = (
                {int(_FILE_NAME.fullmatch(file)[1]): found for file, found in files.items()}
                for files in (fields.pop("xxh3_64"), fields.pop("fp8_errors", {}))
            )
            manifest = cls(**fields, checksums=checksums, errors=errors)
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
            "part": self.part in (MODEL, MTP, FUSED),
            "tp_degree": type(self.tp_degree) is int and 1 <= self.tp_degree <= _MAX_RANKS,
            "dtype": self.dtype in MODEL_DTYPES,
            "weights": self.weights in FORMS,
            "blocks": self.blocks is None
            or [type(size) for size in self.blocks] == [int, int]
            and min(self.blocks) > 0,
            "source": isinstance(self.source, dict),
            "config": isinstance(self.config, dict),
            "xxh3_64": all(isinstance(found, dict) for found in self.checksums.values()),
            "fp8_errors": all(_is_errors(found) for found in self.errors.values()),
        }
        checks["rank"] = checks["tp_degree"] and all(rank < self.tp_degree for rank in self.checksums)
        wrong = [name for name, right in checks.items() if not right]
        if wrong:
            raise ValueError(f"wrong {', '.join(wrong)}")

    def error_of(self, tensor: str) -> float:
        """Relative error of an FP8 tensor, by the Frobenius norm, over the ranks that are written."""
        pairs = [found[tensor] for found in self.errors.values() if tensor in found]
        norm, error = (sum(pair[i] for pair in pairs) for i in (0, 1))
        return (error / norm) ** 0.5 if norm else 0.0

    @classmethod
    def load_existing(cls, folder: Path) -> "Manifest":
        """As load; raises CheckpointError where there is none."""
        manifest = cls.load(folder)
        if manifest is None or not manifest.checksums:
            raise CheckpointError(
                f"{folder / MANIFEST_FILE}: missing; give the OUT_DIR of a finished nxdi-deepseek shard"
            )
        return manifest


def _is_errors(found: Any) -> bool:
    pairs = found.values() if isinstance(found, dict) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and all(type(x) is float for x in pair) for pair in pairs)
