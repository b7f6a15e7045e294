"""Reads the fields of a JSON object one by one, typed, with errors that name the field."""

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

CONFIG_JSON = "config.json"
# What some config.json call a field; a later name counts only where the ones before it are absent.
_OTHER_NAMES = {
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "n_shared_experts": ("num_shared_experts",),
    "num_nextn_predict_layers": ("num_mtp_layers",),
}
_MISSING = object()
_TINY, _LARGE = 1e-30, 1e30  # no field of the family comes near them, and float32 holds both


class ConfigFields:
    """The fields of a JSON object, read one by one. Missing ones are collected, so that all are told at once."""

    def __init__(self, fields: Mapping[str, Any], where: str = CONFIG_JSON, defaults: Mapping[str, Any] | None = None):
        self._fields, self._where, self._missing = fields, where, []
        self._defaults = defaults or {}

    def get(self, name: str, default: Any = _MISSING) -> Any:
        names = (name, *_OTHER_NAMES.get(name, ()))
        value = next((self._fields[name] for name in names if self._fields.get(name) is not None), None)
        if value is None:
            value = self._defaults.get(name)
        if value is None and default is _MISSING:
            self._missing.append(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _MISSING, least: int = 1, most: int = 2**31 - 1) -> Any:
        """A whole number, also where it is written as 4096.0."""
        value = self.get(name, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, value, f"must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: Any = _MISSING, least: float = _TINY) -> Any:
        """A number of at least `least`, by default any above 0."""
        value = self.get(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not least <= value <= _LARGE:
            raise self.error(name, value, f"must be a number {'above 0' if least == _TINY else f'from {least:g} on'}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "must be true or false")
        return value

    def implemented(self, table: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises ConfigError for a field of `table` that is there with a value that is not in its row."""
        for name, allowed in table.items():
            value = self.get(name, None)
            # Equal and of equal type: 1 is not True.
            if value is not None and not any(value == right and type(value) is type(right) for right in allowed):
                supported = f"supported: {', '.join(map(str, allowed))}" if allowed else "leave it out"
                raise self.error(name, value, f"is not supported; {supported}")

    def error(self, name: str, value: Any, what: str) -> ConfigError:
        return ConfigError(f"{self._where}: {name} {value!r} {what}")

    def raise_problems(self) -> None:
        if self._missing:
            what = "is this the config.json of a model of the family?"
            if isinstance(self._fields.get("text_config"), Mapping):
                what = "its text_config is that of a part of a larger model, which is not supported"
            raise ConfigError(f"{self._where}: missing {', '.join(self._missing)}; {what}")
