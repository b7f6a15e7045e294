"""Which files make up a checkpoint folder, and which tensor the index places in which."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_NUMBERED = re.compile(r"model-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")


@dataclass(frozen=True)
class ShardIndex:
    """files: names of the shards. weight_map: tensor -> file by the index; None where the folder has none and needs
    none. total_size: as the index has it. problems: what is wrong with the index, or that files are missing."""

    files: list[str] = field(default_factory=list)
    weight_map: dict[str, str] | None = None
    total_size: Any = None
    problems: list[str] = field(default_factory=list)


def read_index(model_dir: Path) -> ShardIndex:
    """From the index; in its absence from the names of the files, as long as they are all there."""
    path = model_dir / INDEX_FILE
    if not path.exists():
        return _without_index(model_dir)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return ShardIndex(problems=[f"{path}: cannot be read as JSON ({error}); download it again"])
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        return ShardIndex(problems=[f"{path}: its weight_map must give each tensor a file; download it again"])
    unprintable = [name for name in weight_map if not name.isprintable()]
    if unprintable:
        return ShardIndex(problems=[f"{path}: {ascii(unprintable[0])} is no name of a tensor; download it again"])
    metadata = index.get("metadata")
    wrong = metadata is not None and not isinstance(metadata, dict)
    problems = [f"{path}: its metadata must be a JSON object; download it again"] if wrong else []
    total_size = None if wrong or not metadata else metadata.get("total_size")
    return ShardIndex(sorted(set(weight_map.values())), weight_map, total_size, problems)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and Path(value).name == value


def _without_index(model_dir: Path) -> ShardIndex:
    if (model_dir / SINGLE_FILE).exists():
        return ShardIndex([SINGLE_FILE])
    matches = [match for match in map(_NUMBERED.fullmatch, sorted(os.listdir(model_dir))) if match]
    if not matches:
        return ShardIndex(
            problems=[f"{model_dir}: neither {INDEX_FILE} nor {SINGLE_FILE}; give a folder of safetensors files"]
        )
    numbers, total = {int(match[1]) for match in matches}, max(int(match[2]) for match in matches)
    same = all(int(match[2]) == total for match in matches)
    if not (same and len(matches) == len(numbers) == max(numbers) == total and min(numbers) == 1):
        found = f"{len(matches)} of {total} files model-*-of-*.safetensors"
        return ShardIndex(problems=[f"{model_dir}: no {INDEX_FILE}, and {found}; download what is missing"])
    return ShardIndex([match[0] for match in matches])
