"""What to lower."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

PARTS = ("attention", "dense", "moe", "model")
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Request:
    """One graph of rank 0.

    part: attention, a decoder layer with a dense MLP (dense) or with experts (moe), or the whole model. length: of the
    prompt (prefill) or of the cache (decode). config: path of a config.json. impl: folder that holds
    modeling_deepseek.py, None for this package. neuron_config: further fields of the NeuronConfig.
    """

    part: str
    phase: str
    length: int
    batch: int
    tp_degree: int
    config: str
    impl: str | None = None
    neuron_config: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """New tokens per call of the graph."""
        return self.batch * (self.length if self.phase == "prefill" else 1)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Request":
        return cls(**json.loads(text))
