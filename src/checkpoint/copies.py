"""The copies of embedding and head that a checkpoint stores in its MTP layer. The draft uses the model's own."""

import torch

from ..errors import CheckpointError
from ..model_config import ModelConfig
from .convert import read_weight
from .layout import mtp_copies
from .source import TensorSource
from .stored import is_stored, shape_of

_ROWS = 8192


def check_copies(source: TensorSource, config: ModelConfig) -> None:
    """Raises CheckpointError where a copy is not the tensor of the model: the layer would need its own."""
    for copy, own in mtp_copies(config).items():
        if is_stored(source, copy) and not _are_equal(source, config, copy, own):
            raise CheckpointError(
                f"{source.describe(copy)}: differs from {own}; speculation is implemented for an MTP layer that "
                "shares embedding and head with the model"
            )


def _are_equal(source: TensorSource, config: ModelConfig, copy: str, name: str) -> bool:
    rows = shape_of(source, name)[0]
    for start in range(0, rows, _ROWS):
        part = start, min(start + _ROWS, rows)
        if not torch.equal(*(read_weight(source, tensor, config, torch.float32, part) for tensor in (copy, name))):
            return False
    return True
