"""Weights of a checkpoint folder by Hugging Face name, read on demand: memory holds what is asked for, no more."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.checks import check_tensors
from ..checkpoint.convert import read_weight

_BIAS = "e_score_correction_bias"


class Weights:
    """The tensors of a checkpoint, dequantized to `dtype` (the router's correction bias to float32).

    They are read, not mapped: mapped pages of 163 shards would count as this process's memory.
    Raises CheckpointError listing all that does not fit config.json.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        self.reader, self.config, self.dtype = checkpoint.reader, checkpoint.config, dtype
        check_tensors(self.reader, self.config)

    def get(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.reader.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor."""
        dtype = torch.float32 if name.endswith(_BIAS) else self.dtype
        return read_weight(self.reader, name, self.config, dtype, (start, stop))

    def load(self, build: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """A Hugging Face module with its weights: `prefix` and the module's own names make the checkpoint's."""
        with torch.device("meta"):
            module = build()
        module.load_state_dict({name: self.get(prefix + name) for name in module.state_dict()}, assign=True)
        return module.eval()
