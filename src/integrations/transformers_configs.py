"""Config classes for the model_types that transformers has none for without remote code, such as Kimi-K2's.

They are attributes of this module, by which a config is pickled for another process: vLLM starts several.
"""

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..family import FAMILY, Member

_MODEL = "ForCausalLM"


def _make_class(member: Member) -> type[transformers.PretrainedConfig]:
    """That of the judge, under the member's own name and model_type."""
    base = getattr(transformers, member.judge.removesuffix(_MODEL) + "Config")
    name = member.architectures[0].removesuffix(_MODEL) + "Config"
    return type(name, (base,), {"model_type": member.model_type, "__module__": __name__})


_made = {name: _make_class(member) for name, member in FAMILY.items()}
_missing = {name: made for name, made in _made.items() if not hasattr(transformers, made.__name__)}
globals().update((made.__name__, made) for made in _missing.values())


def register_configs() -> None:
    """Makes transformers read a config.json of every member of the family."""
    for name, made in _missing.items():
        if name not in CONFIG_MAPPING:
            AutoConfig.register(name, made)
