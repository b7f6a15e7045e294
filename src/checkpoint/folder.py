"""A checkpoint folder, opened once per command and passed on."""

from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import report_problems
from ..model_config import OTHER_FORM_IN_JSON, ModelConfig, read_config_json, read_model_config
from .checks import checkpoint_problems
from .layout import model_layout
from .quantization import with_stored_blocks
from .reader import CheckpointReader


class Checkpoint:
    """config.json and the headers of the shards; weights are read on demand. Close it, or use it in a `with` block.

    config: how the weights are used: what config.json says, or the config that was given, for example of a model with
    fewer layers; its quantization is the folder's, judged by the tensors. fields: the config.json that makes it.
    Raises ConfigError for a config.json that cannot be; what is wrong with the weights is collected in `problems`.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None):
        self.folder = Path(folder)
        self.fields: dict[str, Any] = read_config_json(folder)
        found = read_model_config(self.fields)
        if config is not None:
            self.fields |= _differing_fields(found, config)
            found = replace(config, quantization=found.quantization)
        self.reader = CheckpointReader(folder)
        self.config = with_stored_blocks(found, self.reader)

    @cached_property
    def problems(self) -> list[str]:
        """The verdict on the folder, see checks.checkpoint_problems: empty where the model can be made of it."""
        return checkpoint_problems(self.reader, self.config)

    def check(self) -> None:
        """Raises one CheckpointError that tells of all problems."""
        report_problems(f"{self.folder}: checkpoint does not fit config.json", self.problems)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()


def _differing_fields(found: ModelConfig, config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json in which `config` differs, if that makes another model of the weights.

    If not, rank files stay those of the folder, for example where only defaults were filled in.
    """
    if list(model_layout(found)) == list(model_layout(config)):
        return {}
    names = {field.name for field in fields(config)} - set(OTHER_FORM_IN_JSON)
    return {name: getattr(config, name) for name in sorted(names) if getattr(config, name) != getattr(found, name)}
