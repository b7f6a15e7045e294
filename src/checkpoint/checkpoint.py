"""A checkpoint folder, opened once per command and passed on."""

from pathlib import Path
from typing import Any

from ..model_config import read_config_json, read_model_config
from .reader import CheckpointReader


class Checkpoint:
    """config.json and the headers of the shards; weights are read on demand. Close it, or use it in a `with` block.

    fields: config.json as it is. config: the same, checked. Raises ConfigError for a config.json that cannot be; what
    is wrong with the shards is collected in `reader.problems`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.fields: dict[str, Any] = read_config_json(folder)
        self.config = read_model_config(self.fields)
        self.reader = CheckpointReader(folder)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()
