"""What to lower."""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from ..errors import GraphCostError
from ..model_config import ModelConfig, read_model_config

PARTS = ("attention", "dense", "moe", "model")
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Request:
    """One graph of rank 0.

    part: attention, a decoder layer with a dense MLP (dense) or with experts (moe), or the whole model. length: of the
    prompt (prefill) or of the cache (decode). config: fields of a config.json. impl: folder that holds
    modeling_deepseek.py, None for this package. neuron_config: further fields of the NeuronConfig. prefix: tokens of
    the prompt that are cached ahead of `length`, in a cache in blocks.
    """

    part: str
    phase: str
    length: int
    batch: int
    tp_degree: int = 64
    config: dict[str, Any] = field(default_factory=dict)
    impl: str | None = None
    neuron_config: dict[str, Any] = field(default_factory=dict)
    prefix: int = 0

    def __str__(self) -> str:
        behind = f" behind {self.prefix}" if self.prefix else ""
        return f"{self.part} {self.phase} {self.length} {self.batch}{behind}"

    @cached_property
    def model(self) -> ModelConfig:
        """The config, checked. Raises ConfigError."""
        return read_model_config(self.config)

    @property
    def layer(self) -> int | None:
        """The first layer that the part can be taken from, None where the model has no layer of that kind."""
        kinds = {"dense": (False,), "moe": (True,)}.get(self.part, (False, True))
        layers = range(self.model.num_hidden_layers)
        return next((layer for layer in layers if self.model.has_experts(layer) in kinds), None)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Request":
        return cls(**json.loads(text))

    @classmethod
    def parse(cls, text: str, **fields: Any) -> "Request":
        """From PART,PHASE,LENGTH,BATCH, and ,PREFIX for a chunk of a prompt."""
        try:
            part, phase, *sizes = text.split(",")
            length, batch, prefix = map(int, (*sizes, 0)[:3])
            request = cls(part, phase, length, batch, **fields, prefix=prefix)
        except ValueError:
            raise GraphCostError(
                f"graph {text!r} is not PART,PHASE,LENGTH,BATCH, such as moe,decode,4096,8, nor that and ,PREFIX"
            ) from None
        if len(sizes) > 3 or prefix < 0 or (prefix and phase != "prefill"):
            raise GraphCostError(f"graph {text!r}: only a prompt has a PREFIX, tokens that are cached ahead of it")
        if part not in PARTS or phase not in PHASES or request.length < 1 or request.batch < 1:
            raise GraphCostError(
                f"graph {text!r}: PART is one of {', '.join(PARTS)}, PHASE is prefill or decode, the rest are positive"
            )
        return request
