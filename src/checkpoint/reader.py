"""Reads a Hugging Face checkpoint folder: safetensors shards, memory-mapped, one tensor at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class CheckpointReader:
    """The tensors of a checkpoint folder, by name. Shards open on construction and stay mapped; data loads on `get`.

    Raises CheckpointError naming the file when the index, a shard or a header cannot be read, or when index and shards
    disagree.
    """

    def __init__(self, model_dir: str | Path):
        self.model_dir = Path(model_dir)
        self._shards = {}
        self._shard_of: dict[str, str] = {}
        weight_map = self._read_index()
        for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]:
            self._open(file)
        if weight_map is not None:
            self._check_index(weight_map)

    def names(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shards[self._shard_of[name]].get_slice(name).get_shape())

    def is_fp8(self, name: str) -> bool:
        return self._shards[self._shard_of[name]].get_slice(name).get_dtype() == "F8_E4M3"

    def get(self, name: str) -> Tensor:
        """The tensor as stored. Raises CheckpointError when there is none of that name."""
        if name not in self._shard_of:
            raise CheckpointError(f"{self.model_dir}: tensor {name} is missing; is the download complete?")
        return self._shards[self._shard_of[name]].get_tensor(name)

    def file_of(self, name: str) -> Path:
        return self.model_dir / self._shard_of[name]

    def _read_index(self) -> dict[str, str] | None:
        path = self.model_dir / INDEX_FILE
        if not path.exists():
            if (self.model_dir / SINGLE_FILE).exists():
                return None
            raise CheckpointError(f"{self.model_dir}: neither {INDEX_FILE} nor {SINGLE_FILE}; give a checkpoint folder")
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error!r}); download it again") from None

    def _open(self, file: str) -> None:
        path = self.model_dir / file
        if not path.exists():
            raise CheckpointError(f"{path}: named by {INDEX_FILE} but missing; download it")
        try:
            shard = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file ({error}); download it again") from None
        self._shards[file] = shard
        for name in shard.keys():  # noqa: SIM118 - a safetensors handle is not a dict
            if name in self._shard_of:
                raise CheckpointError(f"{path}: tensor {name} is also in {self._shard_of[name]}; remove one of the two")
            self._shard_of[name] = file

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if self._shard_of.get(name) != file:
                raise CheckpointError(f"{self.model_dir / file}: lacks {name}, which {INDEX_FILE} places there")
