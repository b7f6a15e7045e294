"""Where weights are read from: a checkpoint folder (reader.CheckpointReader) or a state dict in memory."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..dtypes import BY_TORCH, dtype_name
from .header import TensorEntry
from .layout import canonical_name


class TensorSource(Protocol):
    """Tensors as stored, by Hugging Face name. May be used by several threads.

    entries: dtype and shape of each tensor. problems: what is wrong with the source as a whole, a line each.
    """

    entries: Mapping[str, TensorEntry]
    problems: list[str]

    def names(self) -> Iterator[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype | None: ...

    def describe(self, name: str) -> str:
        """What a message calls the tensor."""

    def is_unreadable(self, name: str) -> bool:
        """Whether the tensor's absence follows from what is among the problems: no need to tell of it too."""

    def nonfinite(self) -> list[str]:
        """Tensors that are known to hold NaN or infinity before they are decoded."""

    def read_rows(
        self, name: str, start: int, stop: int, buffer: np.ndarray, columns: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The bytes of rows start..stop along the first axis, in `buffer` (uint8): uint8 [stop - start, bytes].

        columns: these only, of the tensor seen as [rows, columns].
        """


class StateDictSource:
    """A state dict with Hugging Face's names, or those that layout.canonical_name knows: NxDI strips `model.`."""

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self.problems: list[str] = []
        self._tensors = {canonical_name(name): tensor for name, tensor in state_dict.items()}
        self.entries = {name: _entry(tensor) for name, tensor in self._tensors.items()}

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def describe(self, name: str) -> str:
        return name

    def is_unreadable(self, name: str) -> bool:
        return False

    def nonfinite(self) -> list[str]:
        return []

    def read_rows(
        self, name: str, start: int, stop: int, buffer: np.ndarray, columns: tuple[int, int] | None = None
    ) -> np.ndarray:
        entry = self.entries[name]
        left, right = columns or (0, entry.columns)
        rows = buffer[: (stop - start) * (right - left) * entry.item_bytes].reshape(stop - start, -1)
        tensor = self._tensors[name].detach()
        part = (tensor if tensor.ndim else tensor[None])[start:stop].reshape(stop - start, -1)[:, left:right]
        torch.from_numpy(rows).copy_(part.contiguous().view(torch.uint8))
        return rows


def _entry(tensor: Tensor) -> TensorEntry:
    row = BY_TORCH.get(dtype_name(tensor.dtype))
    return TensorEntry("", row.safetensors if row else str(tensor.dtype), tuple(tensor.shape), 0)
