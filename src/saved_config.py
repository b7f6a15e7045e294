"""What NxDI writes in neuron_config.json and does not read back, or reads without asking whose it is.

A class is written as {"__module__": ..., "__name__": ...}, and NxDI imports what it finds there; an enum's member is
written as the dict of its attributes.
"""

import enum
import importlib
import json
from typing import Any

from .errors import ConfigError

CONFIG_FILE = "neuron_config.json"
# Classes are restored from these packages only, the last of which is this one.
_OURS = __name__.partition(".")[0]
_TRUSTED = ("neuronx_distributed", "neuronx_distributed_inference", "neuronxcc", "nki", "nkilib", _OURS)


def check_saved_config(text: str) -> None:
    """Raises ConfigError where a neuron_config.json has no neuron_config, or names a class of a package not trusted."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{CONFIG_FILE}: cannot be read as JSON ({error}); compile again") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("neuron_config"), dict):
        raise ConfigError(f"{CONFIG_FILE}: holds no neuron_config; compile again")
    todo = [fields]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if "__module__" in value:
                _check_trusted(value["__module__"], value.get("__name__"))
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def restore_enums(value: Any) -> Any:
    """`value` with the members of enums that were written as dicts. Raises ConfigError where there is no such enum."""
    if not isinstance(value, dict):
        return value
    if "_name_" in value:
        return _enum_member(value)
    return {name: restore_enums(item) for name, item in value.items()}


def _enum_member(value: dict[str, Any]) -> enum.Enum:
    try:
        module, name = value["__objclass__"]["__module__"], value["__objclass__"]["__name__"]
        _check_trusted(module, name)
        found = getattr(importlib.import_module(module), name)
        if not issubclass(found, enum.Enum):
            raise TypeError(f"{name} is no enum")
        return found[value["_name_"]]
    except (KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"{CONFIG_FILE}: {value} names no class that is installed ({error!r})") from None


def _check_trusted(module: Any, name: Any) -> None:
    if str(module).partition(".")[0] not in _TRUSTED:
        raise ConfigError(f"{CONFIG_FILE} names the class {module}.{name}, which is none of NxDI's; remove it")
