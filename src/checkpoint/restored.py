"""What unsharding makes of routed experts in FP8.

fp8-block: FP8 with block scales again. Where the checkpoint had such (Manifest.blocks), codes are doubled and scales
halved: the checkpoint's own, but for the sixteen codes that halving rounds. Else codes and scales stay, in the smallest
block that both projections have. fp8: its ranks have scales of their own, for which no format of checkpoints has a
place; weights are multiplied with them in float32 and rounded to the model's dtype.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..dtypes import to_safetensors
from ..model_config import ModelConfig
from ..weight_forms import FP8_BLOCK
from .encodings import BITS, rounded
from .fp8 import CODE_VALUES, SCALE_SUFFIX, scale_shape
from .layout import Source, TensorSpec
from .manifest import Manifest
from .plan import ShardPlan
from .units import Piece, Range

_MAGNITUDES = np.arange(1 << 7)
_DOUBLED = np.minimum(np.where(_MAGNITUDES < 8, 2 * _MAGNITUDES, _MAGNITUDES + 8), 0x7F).astype(np.uint8)
_DOUBLED = np.concatenate([_DOUBLED, _DOUBLED | 0x80])


class RestoredExperts:
    """Of one part of a model. Only for specs with a scale."""

    def __init__(self, plan: ShardPlan, manifest: Manifest):
        self._plan, self._doubled = plan, manifest.blocks is not None
        self.keeps_fp8 = plan.form is FP8_BLOCK
        if self.keeps_fp8:
            rows, columns = FP8_BLOCK.block_size(plan.config, plan.tp_degree)
            finest = columns, min(rows, plan.config.moe_intermediate_size // plan.tp_degree)
            self.block = tuple(manifest.blocks or finest)

    def tensors(self, source: Source) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what is written of a source."""
        yield source.name, "F8_E4M3" if self.keeps_fp8 else to_safetensors(self._plan.dtype), source.shape
        if self.keeps_fp8:
            yield source.name + SCALE_SUFFIX, "F32", scale_shape(source.shape, self.block)

    def quantization_config(self) -> dict[str, Any] | None:
        """For config.json: what says that experts, and nothing else, are FP8."""
        if not self.keeps_fp8:
            return None
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head", "self_attn", "shared_experts", *_dense_mlps(self._plan.config)],
            "quant_method": "fp8",
            "weight_block_size": list(self.block),
        }

    def bits(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """What is written for the codes [rows, columns] of a rank's region with scales [cells down, cells across]."""
        if self.keeps_fp8:
            return _DOUBLED[codes] if self._doubled else codes
        rows, columns = (codes.shape[axis] // scale.shape[axis] for axis in (0, 1))
        return rounded(CODE_VALUES[codes] * scale.repeat(rows, 0).repeat(columns, 1), self._plan.dtype)

    def place_scale(self, piece: Piece, cells: np.ndarray, out: np.ndarray) -> None:
        """Puts the scales of a piece [cells along columns, cells along rows of the source] into the source's."""
        indices = [
            _blocks(extent, block, (extent[1] - extent[0]) // count)
            for extent, block, count in zip(piece.source, self.block, cells.T.shape, strict=True)
        ]
        (rows, row_cells), (columns, column_cells) = indices
        out[np.ix_(rows, columns)] = cells.T[np.ix_(row_cells, column_cells)] * np.float32(0.5 if self._doubled else 1)


def bits_dtype(plan: ShardPlan, spec: TensorSpec, experts: RestoredExperts) -> type[np.number]:
    """Of what is written of a spec."""
    return BITS[plan.dtype] if spec.scale and not experts.keeps_fp8 else BITS[spec.dtype(plan.dtype)]


def _blocks(extent: Range, block: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that an extent of an axis touches, and for each the cell of the extent that lies in it."""
    blocks = np.arange(extent[0] // block, -(-extent[1] // block))
    return blocks, (np.maximum(blocks * block, extent[0]) - extent[0]) // cell


def _dense_mlps(config: ModelConfig) -> list[str]:
    return [f"model.layers.{i}.mlp" for i in range(config.num_hidden_layers) if not config.has_experts(i)]
