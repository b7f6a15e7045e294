"""The parts of a checkpoint that rank files hold: which tensors, and under which names NxDI's modules look for them."""

from collections.abc import Container, Iterator
from dataclasses import replace

import torch

from ..dtypes import to_safetensors
from ..errors import CheckpointError, ConfigError
from ..model_config import ModelConfig
from ..weight_forms import WeightForm
from .layout import TensorSpec, in_form, layer_layout, model_layout, mtp_layout, rank_tensor_names, stores_mtp

# mtp: the MTP layers with all that the checkpoint stores of them. draft: the model that drafts with the first of them.
# fused: draft and model, as NxDI's NeuronFusedSpecModel holds them.
MODEL, MTP, DRAFT, FUSED = "model", "mtp", "draft", "fused"
DRAFT_PREFIX, TARGET_PREFIX = "draft_model.", "target_model."
# What an MTP layer has besides a decoder layer, and what it is called in the draft (src/mtp.py).
_OWN = {
    "enorm": "fc.enorm",
    "hnorm": "fc.hnorm",
    "eh_proj": "fc.eh_proj",
    "shared_head.norm": "layers.0.shared_head_norm",
}


def part_layout(config: ModelConfig, part: str, stored: Container[str] | None = None) -> list[TensorSpec]:
    """The weights of a part. stored: the names of the checkpoint's tensors, None where there is no checkpoint.

    Raises ConfigError where the model has no MTP layer, CheckpointError where the checkpoint lacks it.
    """
    if part == MODEL:
        return list(model_layout(config))
    _check_has_mtp(config, stored)
    if part == MTP:
        return list(mtp_layout(config, stored))
    draft = list(_draft_layout(config))
    return (
        draft if part == DRAFT else [*_prefixed(draft, DRAFT_PREFIX), *_prefixed(model_layout(config), TARGET_PREFIX)]
    )


def part_rank_tensors(config: ModelConfig, part: str) -> list[str]:
    """The int32 tensors that tell a rank its number."""
    if part in (MODEL, MTP):
        return list(rank_tensor_names(config, config.mtp_layers if part == MTP else None))
    layer = config.num_hidden_layers
    draft = [_renamed(name, layer) for name in rank_tensor_names(config, range(layer, layer + 1))]
    if part == DRAFT:
        return draft
    model = [TARGET_PREFIX + name for name in rank_tensor_names(config)]
    return [DRAFT_PREFIX + name for name in draft] + model


def rank_layout(
    config: ModelConfig, tp_degree: int, dtype: torch.dtype, form: WeightForm, part: str = MODEL
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype in safetensors' words, shape) of all that the file of one rank holds of a part."""
    for spec in in_form(part_layout(config, part), form, config, tp_degree):
        for name, tensor_dtype, shape in spec.rank_tensors(dtype, tp_degree):
            yield name, to_safetensors(tensor_dtype), shape
    for name in part_rank_tensors(config, part):
        yield name, "I32", (1,)


def _check_has_mtp(config: ModelConfig, stored: Container[str] | None) -> None:
    layers = config.mtp_layers
    if not layers:
        raise ConfigError("config.json: num_nextn_predict_layers is 0: the checkpoint has no MTP layer to write")
    if stored is not None and not stores_mtp(config, stored):
        raise CheckpointError(
            f"config.json: num_nextn_predict_layers is {len(layers)}, but the checkpoint has no tensors of an MTP "
            f"layer {layers[0]}; leave --with-mtp and speculation out"
        )


def _draft_layout(config: ModelConfig) -> Iterator[TensorSpec]:
    """The first MTP layer as the only layer of a model, between the embedding and the head of the model itself."""
    layer = config.num_hidden_layers
    outside = {spec.name: spec for spec in model_layout(replace(config, num_hidden_layers=0))}
    yield outside["embed_tokens.weight"]
    stored = {f"layers.{layer}.{name}.weight": f"{own}.weight" for name, own in _OWN.items()}
    own = {stored[spec.name]: spec for spec in mtp_layout(config) if spec.name in stored}
    yield from (replace(spec, name=name) for name, spec in own.items())
    yield from (replace(spec, name=_renamed(spec.name, layer)) for spec in layer_layout(config, layer))
    yield outside["lm_head.weight"]


def _renamed(name: str, layer: int) -> str:
    return name.replace(f"layers.{layer}.", "layers.0.", 1)


def _prefixed(specs: Iterator[TensorSpec] | list[TensorSpec], prefix: str) -> Iterator[TensorSpec]:
    return (replace(spec, name=prefix + spec.name) for spec in specs)
