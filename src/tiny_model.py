"""The small trained model that ships with the package, and the golden logits beside it."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

TINY_MODEL_DIR = Path(__file__).parent / "data" / "tiny_deepseek_v3"


@dataclass(frozen=True)
class Goldens:
    """Greedy continuations by transformers in float32.

    texts: the prompts. prompts: their token ids. tokens: int64 [prompts, T]. logits: float32 [prompts, T, vocab], row t
    chose token t.
    """

    texts: list[str]
    prompts: list[list[int]]
    tokens: Tensor
    logits: Tensor


def load_goldens() -> Goldens:
    with safe_open(TINY_MODEL_DIR / "golden.safetensors", framework="pt") as file:
        texts = json.loads(file.metadata()["prompts"])
        ids, lengths = file.get_tensor("prompt_ids").tolist(), file.get_tensor("prompt_lengths").tolist()
        prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        return Goldens(texts, prompts, file.get_tensor("tokens"), file.get_tensor("logits"))
