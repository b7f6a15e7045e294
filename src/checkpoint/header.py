"""The head of a safetensors file: 8 bytes of length (little endian), JSON, then the tensors' bytes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from ..dtypes import BY_SAFETENSORS, LAYOUT_ORDER
from .problem_lines import problem_lines

_LENGTH_BYTES = 8
_MAX_JSON_BYTES = 100_000_000  # the bound of safetensors itself
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file. dtype is the format's name of it; offset counts bytes from the file's start."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def columns(self) -> int:
        """Elements of one index of the first axis."""
        return prod(self.shape[1:])

    @property
    def item_bytes(self) -> int:
        return BY_SAFETENSORS[self.dtype].item_bytes

    @property
    def row_bytes(self) -> int:
        return self.item_bytes * self.columns

    @property
    def nbytes(self) -> int:
        return self.item_bytes * prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What read_header finds. problems: lines that begin with the file's path. digest: XXH3-64 of the header."""

    entries: dict[str, TensorEntry]
    problems: list[str]
    digest: str = ""


class _Object(list):
    """A JSON object as a list of (key, value), so that repeated keys are seen."""


def read_header(path: Path) -> Header:
    """The tensors of a file, and what is wrong with it. Reads no tensor data."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                return Header({}, [f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull"])
            length = int.from_bytes(start[:_LENGTH_BYTES], "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_JSON_BYTES):
                what = f"its header of {length} bytes exceeds the file of {size}; download it again"
                return Header({}, [f"{path}: {what}"])
            file.seek(_LENGTH_BYTES)
            text = file.read(length)
            header = json.loads(text, object_pairs_hook=_Object)
    except OSError as error:
        return Header({}, [f"{path}: cannot be read ({error.strerror}); check that it is there and readable"])
    except (ValueError, RecursionError) as error:
        return Header({}, [f"{path}: its header is not JSON ({error}); download it again"])
    if not isinstance(header, _Object):
        return Header({}, [f"{path}: its header is not a JSON object; download it again"])
    entries, problems = _entries(path, header, _LENGTH_BYTES + length, size)
    return Header(entries, problems, xxhash.xxh3_64_hexdigest(text))


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The bytes before the data, and where each tensor goes, for (name, dtype, shape): as safetensors' save_file."""
    header, entries, offset = {"__metadata__": metadata} if metadata else {}, {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (LAYOUT_ORDER[tensor[1]], tensor[0])):
        entry = entries[name] = TensorEntry("", dtype, tuple(shape), offset)
        offset += entry.nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [entry.offset, offset]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    moved = {name: TensorEntry("", e.dtype, e.shape, e.offset + len(head)) for name, e in entries.items()}
    return head, moved


def _entries(path: Path, header: _Object, data_start: int, size: int) -> tuple[dict[str, TensorEntry], list[str]]:
    entries, found = {}, []
    for name, fields in header:
        if name == "__metadata__":
            if not _is_metadata(fields):
                found.append((f"{path}: __metadata__", "must be a JSON object of texts; download the file again"))
            continue
        where = f"{path}: {name if name.isprintable() else ascii(name)}"
        try:
            if not name.isprintable():
                raise ValueError("a name that cannot be printed")
            entry, end = _entry(path.name, fields, data_start)
        except (KeyError, TypeError, ValueError) as error:
            found.append((where, f"bad entry in the header ({error}); download the file again"))
            continue
        if name in entries:
            found.append((where, "twice in the header; download the file again"))
        if end != entry.offset + entry.nbytes or entry.offset < data_start:
            sizes = f"{end - entry.offset} bytes in the header, but {entry.dtype} {list(entry.shape)} has"
            found.append((where, f"{sizes} {entry.nbytes}; download the file again"))
        entries[name] = entry
    return entries, problem_lines(found) + _misplaced(path, entries, data_start, size)


def _is_metadata(value: Any) -> bool:
    """What safetensors itself reads: nothing, or texts by name."""
    return value is None or (isinstance(value, _Object) and all(isinstance(text, str) for _, text in value))


def _entry(file: str, fields: Any, data_start: int) -> tuple[TensorEntry, int]:
    if not isinstance(fields, _Object):
        raise TypeError("not a JSON object")
    fields = dict(fields)
    dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if dtype not in BY_SAFETENSORS:
        raise ValueError(f"unknown dtype {dtype}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shape and data_offsets must be natural numbers")
    return TensorEntry(file, dtype, shape, data_start + begin), data_start + end


def _misplaced(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> list[str]:
    """Overlaps, holes and a wrong end: the format wants the tensors side by side until the end of the file."""
    found, position = [], data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            kind = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            found.append((f"{path}: {name}", f"{kind}; download the file again"))
        position = entry.offset + entry.nbytes
    problems = problem_lines(found)
    if position != size:
        problems.append(
            f"{path}: not a complete safetensors file: {size} bytes, {position} by its header; download it again"
        )
    return problems
