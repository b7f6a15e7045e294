"""Config classes for the model_types that transformers has none for without remote code, such as Kimi-K2's.

They are attributes of this module, by which a config is pickled for another process: vLLM starts several.
"""

from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..family import FAMILY, WRAPPERS, Member, text_fields

_MODEL = "ForCausalLM"


def _take_fields(self: Any, **fields: Any) -> None:
    # transformers 5 checks RoPE ahead of taking the fields, and asks for this one.
    self.max_position_embeddings = fields.get("max_position_embeddings")
    transformers.PretrainedConfig.__init__(self, **fields)


def _make_class(member: Member) -> type[transformers.PretrainedConfig]:
    """One without defaults, under the member's own name and model_type. The judge's would give fields that config.json
    lacks, or has under another name, the values of another model."""
    name = member.architectures[0].removesuffix(_MODEL) + "Config"
    attributes = {"model_type": member.model_type, "__module__": __name__, "__init__": _take_fields}
    return type(name, (transformers.PretrainedConfig,), attributes)


def _make_wrapper(model_type: str, architecture: str) -> type[transformers.PretrainedConfig]:
    """A config that has the text model's fields as its own, and writes itself as that of the text model."""

    def __init__(self: Any, **fields: Any) -> None:
        text = text_fields({"model_type": model_type, **fields}) if fields.get("text_config") else fields
        named = {name: value for name, value in text.items() if name not in ("model_type", "architectures")}
        _take_fields(self, architectures=[architecture], **named)
        self.text_model_type = named.get("text_model_type", text.get("model_type", model_type))

    def to_dict(self: Any) -> dict[str, Any]:
        return transformers.PretrainedConfig.to_dict(self) | {"model_type": self.text_model_type}

    name = architecture.partition("For")[0] + "Config"
    attributes = {"model_type": model_type, "__module__": __name__, "__init__": __init__, "to_dict": to_dict}
    return type(name, (transformers.PretrainedConfig,), attributes)


_made = {name: _make_class(member) for name, member in FAMILY.items()}
_made |= {name: _make_wrapper(name, architectures[0]) for name, architectures in WRAPPERS.items() if architectures}
_missing = {name: made for name, made in _made.items() if not hasattr(transformers, made.__name__)}
globals().update((made.__name__, made) for made in _missing.values())


def register_configs() -> None:
    """Makes transformers read a config.json of every member of the family."""
    for name, made in _missing.items():
        if name not in CONFIG_MAPPING:
            AutoConfig.register(name, made)
