"""What drafting with the MTP layer is worth while memory bounds a step: bytes read with it and without.

Experts are read as NxD's selective loading reads them: one for each choice of each token, until that is all of them.
The draft's last run, which refreshes its cache, is left out: it has no experts. Arithmetic, no measurement.
"""

from collections.abc import Mapping

from ..checkpoint.parts import DRAFT, MODEL
from ..model_config import ModelConfig
from ..speculation import experts_are_blockwise
from .rank_memory import CompiledShape, cache_bytes_per_token
from .weight_parts import weight_bytes

_EXPERT_PARTS = ("experts", "expert scales")
_BLOCK = 128  # of the expert kernel that is chosen where nothing else is


def speculation_gains(
    config: ModelConfig, shape: CompiledShape, acceptance: float, batches: tuple[int, ...]
) -> Mapping[int, float | None]:
    """How many times the tokens per second of plain decoding, by batch size, at a share of accepted drafts. None where
    the model refuses to speculate."""
    length = shape.speculation_length
    tokens = sum(acceptance**i for i in range(length))
    gains: dict[int, float | None] = {}
    for batch in batches:
        if experts_are_blockwise(config, batch * length, _BLOCK):
            gains[batch] = None
            continue
        plain, verified = (_read(config, shape, MODEL, batch, t) for t in (batch, batch * length))
        drafted = (length - 1) * _read(config, shape, DRAFT, batch, batch)
        gains[batch] = tokens * plain / (verified + drafted)
    return gains


def _read(config: ModelConfig, shape: CompiledShape, part: str, batch: int, tokens: int) -> float:
    """Bytes that a rank reads for `tokens` new tokens of `batch` sequences."""
    weights = weight_bytes(config, shape.tp_degree, shape.dtype, shape.form, part)
    experts = sum(weights[name] for name in _EXPERT_PARTS)
    always = sum(weights.values()) - experts - weights["embedding"]
    share = min(1.0, tokens * config.num_experts_per_tok / config.n_routed_experts)
    cache = cache_bytes_per_token(config, shape.dtype, config.num_hidden_layers if part == MODEL else 1)
    return always + share * experts + batch * shape.seq_len * cache
