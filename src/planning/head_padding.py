"""What it costs that ranks hold as many heads each, where they do not divide the model's."""

from dataclasses import dataclass
from math import prod

from ..checkpoint.layout import in_form, model_layout
from ..dtypes import BY_TORCH
from ..model_config import ModelConfig
from .rank_memory import CompiledShape


@dataclass(frozen=True)
class HeadPadding:
    """heads: of the model. padded: those of all ranks together. bytes: zeros in the weights of all ranks together."""

    heads: int
    padded: int
    bytes: int

    @property
    def share(self) -> float:
        """Of the work that attention does head by head."""
        return 1 - self.heads / self.padded


def head_padding(config: ModelConfig, shape: CompiledShape) -> HeadPadding:
    specs = in_form(model_layout(config), shape.form, config, shape.tp_degree)
    zeros = sum(spec.numel - sum(prod(source.shape) for source in spec.sources) for spec in specs if spec.padding)
    size = zeros * BY_TORCH[shape.dtype].item_bytes
    return HeadPadding(config.num_attention_heads, config.padded_heads(shape.tp_degree), size)
