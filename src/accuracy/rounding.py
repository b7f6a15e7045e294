"""How far two right computations may be apart: the yardstick for ties and for traces.

Independent roundings add up like a random walk: after n of them the relative error is about sqrt(n) * u, u the unit
roundoff (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019). A layer rounds what goes on
to the next one about 4 times: after attention, after the MLP, and at the two additions. In float32 every sum of K
products adds its K roundings to these; in bfloat16 it does not, since sums are kept in float32 and rounded once.
"""

import torch

_ROUNDINGS_PER_LAYER = 4
_UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
# Times the expected error that a row of a trace may have: softmax and norms of single tokens amplify what they get. The
# right model reaches a third of it in float32, over the configurations of the parity tests, and two thirds in bfloat16.
TRACE_MARGIN = 16


def relative_error(dtype: str, layers: int, hidden_size: int) -> float:
    """Of hidden states or logits after `layers` layers, relative to their largest values."""
    roundings = _ROUNDINGS_PER_LAYER * max(layers, 1) * (hidden_size if dtype == "float32" else 1)
    return _UNIT_ROUNDOFF[dtype] * roundings**0.5


def tie_margin(dtype: str, layers: int, hidden_size: int, logits: torch.Tensor) -> torch.Tensor:
    """The distance [...] of two logits [..., vocab] below which rounding alone decides which is larger."""
    return 2**0.5 * relative_error(dtype, layers, hidden_size) * logits.abs().amax(-1)


def coarser(*dtypes: str) -> str:
    return max(dtypes, key=_UNIT_ROUNDOFF.__getitem__)
