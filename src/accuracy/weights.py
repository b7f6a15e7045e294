"""Weights of a checkpoint folder by Hugging Face name, read on demand: memory holds what is asked for, no more."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.checks import check_tensors, weight_block_size
from ..checkpoint.convert import read_weight
from ..checkpoint.fp8 import SCALE_SUFFIX
from ..checkpoint.reader import CheckpointReader

_BIAS = "e_score_correction_bias"


class Weights:
    """The tensors of a checkpoint, dequantized to `dtype` (the router's correction bias to float32).

    They are read, not mapped: mapped pages of 163 shards would count as this process's memory.
    Raises CheckpointError listing all that does not fit config.json.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        self.reader, self.dtype = checkpoint.reader, dtype
        check_tensors(self.reader, checkpoint.config)
        self.block_size = weight_block_size(checkpoint.config)

    def get(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.reader.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor."""
        aligned = start - start % self.block_size[0]
        source = _Rows(self.reader, aligned, stop, self.block_size[0])
        dtype = torch.float32 if name.endswith(_BIAS) else self.dtype
        return read_weight(source, name, dtype, self.block_size)[start - aligned :]

    def load(self, build: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """A Hugging Face module with its weights: `prefix` and the module's own names make the checkpoint's."""
        with torch.device("meta"):
            module = build()
        module.load_state_dict({name: self.get(prefix + name) for name in module.state_dict()}, assign=True)
        return module.eval()


class _Rows:
    """What read_weight takes: some rows of each weight, with the rows of its scale that belong to them."""

    def __init__(self, reader: CheckpointReader, start: int, stop: int, block_rows: int):
        self.reader, self.start, self.stop, self.block_rows = reader, start, stop, block_rows

    def describe(self, name: str) -> str:
        return self.reader.describe(name)

    def get(self, name: str) -> Tensor:
        step = self.block_rows if name.endswith(SCALE_SUFFIX) else 1
        start, stop = self.start // step, -(-self.stop // step)
        shape = (stop - start, *self.reader.shape(name)[1:])
        buffer = np.empty((stop - start) * self.reader.entries[name].row_bytes, np.uint8)
        self.reader.read_rows(name, start, stop, buffer)
        return torch.from_numpy(buffer).view(self.reader.dtype(name)).view(shape)
