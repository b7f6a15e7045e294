"""The element types that checkpoints, rank files and graphs hold, under all their names. The one table of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """torch: the name in torch, None where it has none. safetensors, hlo: the names in these formats, None likewise."""

    torch: str | None
    safetensors: str | None
    hlo: str | None
    item_bytes: int

    def to_torch(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.torch)


# In the order in which safetensors lays out the tensors of a file: by alignment, then as its own enumeration has them.
_TABLE = (
    DType("uint64", "U64", "U64", 8),
    DType("int64", "I64", "S64", 8),
    DType("float64", "F64", "F64", 8),
    DType("float32", "F32", "F32", 4),
    DType("uint32", "U32", "U32", 4),
    DType("int32", "I32", "S32", 4),
    DType("bfloat16", "BF16", "BF16", 2),
    DType("float16", "F16", "F16", 2),
    DType("uint16", "U16", "U16", 2),
    DType("int16", "I16", "S16", 2),
    DType("float8_e8m0fnu", "F8_E8M0", "F8E8M0FNU", 1),
    DType("float8_e4m3fn", "F8_E4M3", "F8E4M3FN", 1),
    DType("float8_e5m2", "F8_E5M2", "F8E5M2", 1),
    DType("int8", "I8", "S8", 1),
    DType("uint8", "U8", "U8", 1),
    DType("bool", "BOOL", "PRED", 1),
    DType(None, None, "TOKEN", 0),
)
BY_TORCH = {row.torch: row for row in _TABLE if row.torch}
BY_SAFETENSORS = {row.safetensors: row for row in _TABLE if row.safetensors}
BY_HLO = {row.hlo: row for row in _TABLE if row.hlo}
LAYOUT_ORDER = {name: place for place, name in enumerate(BY_SAFETENSORS)}

# What a model can be computed in, and rank files written in.
MODEL_DTYPES = ("bfloat16", "float32")


def model_dtype(name: str) -> "torch.dtype":
    """The torch dtype of one of MODEL_DTYPES. Raises ConfigError for another name."""
    if name not in MODEL_DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; use {' or '.join(MODEL_DTYPES)}")
    return BY_TORCH[name].to_torch()


def dtype_name(dtype: "torch.dtype") -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def to_safetensors(dtype: "torch.dtype") -> str:
    """`BF16` for torch.bfloat16."""
    return BY_TORCH[dtype_name(dtype)].safetensors
