"""The forms in which a rank holds its routed experts: one table, read by the sharder, the model's config and the plan.

All other weights (attention, dense MLPs, shared experts, router, embedding, head) have the model's dtype in every form.
FP8 codes are e4m3 with 240 as the largest: trn2 reads exponent 15 as infinity. Weight = code * scale, scales float32.

Sizes: E experts, H hidden, I moe_intermediate_size. Weights are [E, H, 2I] (gate_up, gate first) and [E, I, H] (down),
split over the ranks along 2I (gate and up each) and I. A scale's shape tells its block: weight shape / scale shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .model_config import ModelConfig

LARGEST_CODE = 240.0
_RELEASED_BLOCK = (128, 128)
GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class ExpertScale:
    """The scale of gate_up or down, float32, under the weight's name with `scale` for `weight`.

    shape: as NxD has it in an unsharded state dict. partition_dim, stride: how the ranks split it, as their weight;
    partition_dim None: of one shape on all ranks, though rank files may hold other values on each.
    """

    shape: tuple[int, int, int]
    partition_dim: int | None
    stride: int = 1

    def rank_shape(self, tp_degree: int) -> tuple[int, int, int]:
        """The shape of one rank's part."""
        shape = list(self.shape)
        if self.partition_dim is not None:
            shape[self.partition_dim] //= tp_degree
        return tuple(shape)


@dataclass(frozen=True)
class WeightForm:
    """name: as users choose it. quantization_type: NxD's name of it, None where nothing is quantized.

    block_size(config, tp_degree): quantization_block_size of NxD, the rows and columns of [E, rows, columns] that share
    a scale, None where NxD has no such field for the form.
    """

    name: str
    what: str
    quantization_type: str | None
    block_size: Callable[["ModelConfig", int], tuple[int, int] | None]

    @property
    def is_fp8(self) -> bool:
        return self.quantization_type is not None

    def check(self, config: "ModelConfig", tp_degree: int) -> None:
        """Raises ConfigError where the form is not to be had for `tp_degree` ranks."""
        config.check_tensor_parallel(tp_degree)
        block = self.block_size(config, tp_degree)
        # Four bytes a block: with four weights in one, FP8 takes as much as BF16.
        if block and block[0] * block[1] <= 4:
            width = config.moe_intermediate_size // tp_degree
            raise ConfigError(
                f"weights {self.name}: {width} of {config.moe_intermediate_size} intermediate values on each of "
                f"{tp_degree} ranks leave blocks of {block[0]}x{block[1]}; use weights fp8 or another tp_degree"
            )

    def neuron_fields(self, config: "ModelConfig", tp_degree: int) -> dict[str, Any]:
        """The fields of NeuronConfig that make NxD hold experts in this form, without modules_to_not_convert."""
        if not self.is_fp8:
            return {"quantized": False}
        fields = {"quantized": True, "quantization_type": self.quantization_type, "quantization_dtype": "f8e4m3"}
        block = self.block_size(config, tp_degree)
        return fields | ({"quantization_block_axis": [1, 2], "quantization_block_size": list(block)} if block else {})

    def scale(self, projection: str, config: "ModelConfig", tp_degree: int) -> ExpertScale | None:
        """That of `gate_up_proj` or `down_proj`; None where weights have none."""
        if not self.is_fp8:
            return None
        E, H, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        block = self.block_size(config, tp_degree)
        if block is None:
            # Down's ranks each hold a part of the sum over I, and scale it before the sum: each may have its own.
            return ExpertScale((E, 1, 2 * I), 2, 2) if projection == GATE_UP else ExpertScale((E, 1, H), None)
        rows, columns = block
        if projection == GATE_UP:
            return ExpertScale((E, H // rows, 2 * I // columns), 2, 2)
        rank_rows = max(1, I // tp_degree // rows)  # NxD cuts a block that is longer than a rank's rows
        return ExpertScale((E, tp_degree * rank_rows, H // columns), 1)


def _block_size(config: "ModelConfig", tp_degree: int) -> tuple[int, int]:
    """Each block of a rank lies in one block of the checkpoint (128x128 if config.json says nothing), so that its codes
    and scale are the checkpoint's own: [128, I/tp_degree] at the released sizes and 64 ranks."""
    stored = config.quantization and config.quantization.block_size or _RELEASED_BLOCK
    width = config.moe_intermediate_size // tp_degree
    rows = gcd(stored[1], config.hidden_size)
    if width % rows and rows % width:
        rows = gcd(rows, width)
    return rows, gcd(stored[0], width, config.hidden_size)


FORMS = {
    form.name: form
    for form in (
        WeightForm("bf16", "the model's dtype", None, lambda config, tp_degree: None),
        WeightForm(
            "fp8",
            "FP8, a scale per output channel",
            "expert_wise_per_channel_symmetric",
            lambda config, tp_degree: None,
        ),
        WeightForm("fp8-block", "FP8, the checkpoint's own codes and scales", "blockwise_symmetric", _block_size),
    )
}
BF16, FP8, FP8_BLOCK = FORMS.values()


def weight_form(name: str) -> WeightForm:
    """The row of a name. Raises ConfigError for another name."""
    if name not in FORMS:
        raise ConfigError(f"weights {name!r} is not supported; use {', '.join(FORMS)}")
    return FORMS[name]


def form_of_quantization_type(quantization_type: str) -> WeightForm:
    """The row of NxD's name. Raises ConfigError for a type that the model has no form for."""
    for form in FORMS.values():
        if form.quantization_type == quantization_type:
            return form
    names = ", ".join(form.quantization_type for form in FORMS.values() if form.is_fp8)
    raise ConfigError(f"neuron_config: quantization_type {quantization_type!r} is not supported; use {names}")
