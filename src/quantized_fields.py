"""The word `weights` of the NeuronConfig, and the fields that NxDI wants in its place."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .weight_forms import BF16, FORMS, FP8_BLOCK, WeightForm, form_of_quantization_type, weight_form

if TYPE_CHECKING:
    from .model_config import ModelConfig

# What NxDI has, and vLLM's plugin passes, where nothing was asked for.
_UNSET = {
    "quantized": False,
    "quantization_type": "per_tensor_symmetric",
    "quantization_dtype": "int8",
    "quantization_scale_dtype": "f32",
    "quantization_block_axis": None,
    "quantization_block_size": None,
    "modules_to_not_convert": None,
}
_BLOCKS = ("quantization_block_axis", "quantization_block_size")
# The layers whose weights stay in torch_dtype, by parts of their names. `mlp` or `down_proj` would be a part of the
# experts' names too: NxDI would make their codes BF16 and drop the scales.
_KEPT = ["self_attn", "shared_experts", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]


def fill_weights(fields: Mapping[str, Any]) -> dict[str, Any]:
    """NeuronConfig's keyword arguments with `weights` (bf16 if nothing says otherwise) and NxDI's names for that form.

    The form may also be told by NxDI's own `quantization_type`. Raises ConfigError where fields contradict each other,
    or ask for a form that the model has not.
    """
    given = {name: fields[name] for name, unset in _UNSET.items() if fields.get(name) not in (None, unset)}
    form = _asked_form(fields.get("weights"), given)
    if not form.is_fp8:
        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(f"neuron_config: {name}={value!r} needs weights, one of {_names()}")
        return {**fields, "weights": form.name}
    filled = {"quantized": True, "quantization_type": form.quantization_type, "quantization_dtype": "f8e4m3"}
    filled["modules_to_not_convert"] = list(_KEPT)
    # Blocks depend on the model, which check_weights knows.
    later = _BLOCKS if form is FP8_BLOCK else ()
    for name, value in given.items():
        if name not in later and value != filled.get(name):
            raise ConfigError(
                f"neuron_config: {name} {value!r} is not supported; leave it out, weights {form.name} fills it in"
            )
    # NxDI demands a path. It is not used: ranks get their FP8 weights from the checkpoint.
    path = fields.get("quantized_checkpoints_path") or ""
    return {**fields, **filled, "quantized_checkpoints_path": path, "weights": form.name}


def check_weights(neuron_config: Any, model: "ModelConfig") -> None:
    """Fills in the block size that the model has on its ranks. Raises ConfigError for another that was given, and for a
    form that is not to be had."""
    form = weight_form(neuron_config.weights)
    form.check(model, neuron_config.tp_degree)
    for name, wanted in form.neuron_fields(model, neuron_config.tp_degree).items():
        value = getattr(neuron_config, name, None)
        if name in _BLOCKS and value not in (None, wanted):
            raise ConfigError(
                f"neuron_config: {name} {value!r} does not fit, {wanted} does for tp_degree {neuron_config.tp_degree}; "
                "leave it out"
            )
        setattr(neuron_config, name, wanted)


def _asked_form(word: Any, given: Mapping[str, Any]) -> WeightForm:
    if word is not None:
        return weight_form(word if isinstance(word, str) else repr(word))
    if "quantization_type" in given and "quantized" in given:
        return form_of_quantization_type(given["quantization_type"])
    return BF16


def _names() -> str:
    return " or ".join(form.name for form in FORMS.values() if form.is_fp8)
