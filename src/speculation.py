"""Speculation with the checkpoint's own MTP layer: the NeuronConfig fields of NxDI's fused EAGLE drafts, filled in and
checked, and the config of the draft.

The draft has the fields of the model itself; `is_eagle_draft` in its NeuronConfig makes it the MTP layer.
"""

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .model_config import ModelConfig

MTP = "mtp"
# One token drafted and one of the model, each step.
SPECULATION_LENGTH = 2
# From this many sequences on, a step reads nearly every expert anyway, and the drafted tokens add their own.
_LARGE_BATCH = 16
# Fields of NxDI that go along with other drafts only.
_REFUSED = {
    "is_eagle3": (False, "the draft is the checkpoint's MTP layer; leave it off"),
    "enable_eagle_draft_input_norm": (False, "the MTP layer has its own norms; leave it off"),
    "token_tree_config": (None, "one token after the other is drafted; leave it unset"),
    "eagle_rolling_buffer_kernel_enabled": (False, "leave it off"),
    "is_block_kv_layout": (False, "the draft's cache is not paged; leave it off"),
    "is_prefix_caching": (False, "the draft's cache is not paged; leave it off"),
    "is_chunked_prefill": (False, "the draft takes prompts in one piece; leave it off"),
    "async_mode": (False, "it was not tested with MTP; leave it off"),
    "output_logits": (False, "accepted tokens come without logits; leave it off"),
    "sequence_parallel_enabled": (False, "the draft does not take a prompt in parts; leave it off"),
}


def fill_speculation(fields: Mapping[str, Any], compiled: bool) -> dict[str, Any]:
    """NeuronConfig's keyword arguments with what NxDI wants beside `enable_eagle_speculation`. compiled: tokens are
    chosen in the graph."""
    if not fields.get("enable_eagle_speculation"):
        return dict(fields)
    draft = bool(fields.get("is_eagle_draft"))
    filled = {"speculation_length": SPECULATION_LENGTH, "enable_fused_speculation": not draft}
    if compiled:
        filled |= {"on_device_sampling_config": {}, "disable_kv_cache_tiling": True}
    return {**fields, **{name: value for name, value in filled.items() if fields.get(name) in (None, False, 0)}}


def check_speculation(neuron_config: Any, model: "ModelConfig", prompt_lengths: Iterable[int]) -> None:
    """Raises ConfigError for a NeuronConfig whose speculation is not the MTP layer's, or that cannot go with it. Warns
    of a batch at which it hardly pays."""
    length = neuron_config.speculation_length
    if not neuron_config.enable_eagle_speculation:
        if length or neuron_config.enable_fused_speculation:
            raise ConfigError(
                "neuron_config: speculation_length and enable_fused_speculation are supported with the checkpoint's "
                "MTP layer only; set enable_eagle_speculation"
            )
        return
    if not model.num_nextn_predict_layers:
        raise ConfigError(
            f"config.json: num_nextn_predict_layers is 0: a {model.model_type} checkpoint without an MTP layer has no "
            "draft; turn speculation off"
        )
    if type(length) is not int or length < SPECULATION_LENGTH:
        raise ConfigError(f"neuron_config: speculation_length {length!r} must be an integer of at least 2")
    for field, (works, remedy) in _REFUSED.items():
        value = getattr(neuron_config, field, works)
        if value != works and value:
            raise ConfigError(
                f"neuron_config: {field}={value!r} is not supported with enable_eagle_speculation; {remedy}"
            )
    sampling = neuron_config.on_device_sampling_config
    if sampling and (sampling.do_sample or sampling.dynamic):
        raise ConfigError(
            "neuron_config: on_device_sampling_config: do_sample and dynamic are not supported with speculation, which "
            "is greedy on the device; leave it unset"
        )
    if length in prompt_lengths:
        raise ConfigError(
            f"neuron_config: prompts padded to speculation_length {length} would be taken for drafted tokens; "
            "change max_context_length or context_encoding_buckets"
        )
    _check_experts(neuron_config, model, length)


def _check_experts(neuron_config: Any, model: "ModelConfig", length: int) -> None:
    """NxD gives the tokens of a step that it verifies to the form of its experts that prompts of that size have."""
    batch = neuron_config.tkg_batch_size
    matmul = neuron_config.blockwise_matmul_config
    block = matmul.get("block_size") if isinstance(matmul, Mapping) else getattr(matmul, "block_size", None)
    if block and experts_are_blockwise(model, batch * length, block):
        chosen = batch * length * model.num_experts_per_tok
        raise ConfigError(
            f"neuron_config: {batch} sequences of speculation_length {length} choose {chosen} experts in a step, which "
            f"the kernel for prompts would compute (block_size {block}); take a smaller batch or speculation_length"
        )
    if batch >= _LARGE_BATCH:
        warnings.warn(
            f"batch of {batch}: with speculation a step reads the experts of {batch * length} tokens; from "
            f"{_LARGE_BATCH} sequences on it hardly pays",
            stacklevel=2,
        )


def experts_are_blockwise(model: "ModelConfig", tokens: int, block: int) -> bool:
    """Whether NxD computes the experts of a step of several tokens a sequence by the kernel that prompts have."""
    return tokens * model.num_experts_per_tok >= max(block, model.n_routed_experts)


def draft_config(config: Any) -> Any:
    """The config of the draft beside the model's, both with the same fields of config.json."""
    draft = copy.copy(config)
    draft.neuron_config = copy.deepcopy(config.neuron_config)
    draft.neuron_config.is_eagle_draft, draft.neuron_config.enable_fused_speculation = True, False
    draft.fused_spec_config = None
    return draft


def check_draft(model: "ModelConfig", draft: "ModelConfig") -> None:
    """Raises ConfigError where the draft that was asked for is not the checkpoint itself, which holds the MTP layer."""
    for field in dataclasses.fields(model):
        mine, other = getattr(model, field.name), getattr(draft, field.name)
        if mine != other:
            raise ConfigError(
                f"draft model: {field.name} {other!r} is not the model's {mine!r}; the draft is the checkpoint's own "
                "MTP layer, give the model's folder as the draft's"
            )
