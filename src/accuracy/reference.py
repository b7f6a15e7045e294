"""The judge: Hugging Face's own classes for a checkpoint folder, their config, their weights, and the whole model."""

import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoint.convert import dequantized_state_dict, read_weight
from ..checkpoint.folder import Checkpoint
from ..checkpoint.layout import model_layout
from ..errors import ConfigError
from ..memory import check_memory
from ..model_config import ModelConfig

_BIAS = "e_score_correction_bias"
_CAUSAL_LM = "ForCausalLM"
_FORMER_NAMES = {"TopkRouter": "MoEGate"}  # DeepSeek-V2's in transformers 4
# Fields of ModelConfig that transformers' config does not get, or gets in a form of its own.
_CONVERTED = {"model_type", "dtype", "quantization", "num_nextn_predict_layers", "rope_scaling", "eos_token_id"}
_DENSE_LAYERS = {"first_k_dense_replace", "moe_layer_freq"}
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def judge_class(config: ModelConfig, part: str = _CAUSAL_LM) -> type[nn.Module]:
    """transformers' class that judges this member of the family, or a module of it: `Attention`, `MLP`, ..."""
    judge = config.member.judge
    found = getattr(transformers, judge, None)
    if found is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no {judge}, the judge of {config.model_type}; "
            "install 5.24 or newer"
        )
    modeling, name = sys.modules[found.__module__], judge.removesuffix(_CAUSAL_LM)
    return getattr(modeling, name + part, None) or getattr(modeling, name + _FORMER_NAMES[part])


def hugging_face_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """transformers' config for unquantized weights and eager attention.

    It gets the fields that this package reads and no others: a stray `head_dim` or `num_key_value_heads` would make it
    another model's. Raises ConfigError where transformers refuses a value.
    """
    config = checkpoint.config
    try:
        hf_config = judge_class(config).config_class(**_values(checkpoint), attn_implementation="eager")
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{checkpoint.folder / 'config.json'}: transformers refuses it ({reason})") from None
    _check_softmax_scale(config, hf_config)
    return hf_config


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    config, config_class = checkpoint.config, judge_class(checkpoint.config).config_class
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _CONVERTED}
    kinds = ["sparse" if config.has_experts(layer) else "dense" for layer in range(config.num_hidden_layers)]
    if hasattr(config_class, "mlp_layer_types"):
        values = {name: value for name, value in values.items() if name not in _DENSE_LAYERS}
        values["mlp_layer_types"] = kinds
    scaling = _rope_scaling(checkpoint)
    if hasattr(config_class, "rope_parameters"):
        theta = values.pop("rope_theta")
        values["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    else:
        values["rope_scaling"] = scaling
    stop_tokens = list(config.eos_token_id)
    return values | {
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "eos_token_id": stop_tokens[0] if len(stop_tokens) == 1 else stop_tokens or None,
    }


def _rope_scaling(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What config.json says of YaRN under either of its names; transformers fills in the rest in its own way."""
    scaling = checkpoint.config.rope_scaling
    if scaling is None:
        return None
    stated = checkpoint.fields.get("rope_parameters") or checkpoint.fields["rope_scaling"]
    return {"rope_type": "yarn"} | {k: v for k, v in asdict(scaling).items() if stated.get(k) is not None}


def _check_softmax_scale(config: ModelConfig, hf_config: PretrainedConfig) -> None:
    """transformers 4 leaves YaRN's factor out of DeepSeek-V2's softmax: there it is no judge."""
    with torch.device("meta"):
        scale = judge_class(config, "Attention")(hf_config, 0).scaling
    if abs(scale / config.softmax_scale - 1) > 1e-6:
        raise ConfigError(
            f"transformers {transformers.__version__} scales the softmax of {config.model_type} by {scale:.4f}, its "
            f"release by {config.softmax_scale:.4f}; install 5.24 or newer"
        )


class Weights:
    """The tensors of a checkpoint by Hugging Face name, read on demand: memory holds what is asked for, no more.

    They come dequantized to `dtype` (the router's correction bias to float32). They are read, not mapped: mapped pages
    of 163 shards would count as this process's memory. Raises CheckpointError listing what does not fit config.json.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        self.reader, self.config, self.dtype = checkpoint.reader, checkpoint.config, dtype
        checkpoint.check()

    def get(self, name: str) -> Tensor:
        """A whole tensor. The correction bias of a member that has none is zero."""
        if name.endswith(_BIAS) and not self.config.member.correction_bias:
            return torch.zeros(self.config.n_routed_experts)
        return self._read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor."""
        return self._read(name, (start, stop))

    def _read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        dtype = torch.float32 if name.endswith(_BIAS) else self.dtype
        return read_weight(self.reader, name, self.config, dtype, rows)

    def load(self, build: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """A Hugging Face module with its weights: `prefix` and the module's own names make the checkpoint's."""
        with torch.device("meta"):
            module = build()
        module.load_state_dict({name: self.get(prefix + name) for name in module.state_dict()}, assign=True)
        return module.eval()


def hugging_face_model(model_dir: str | Path) -> PreTrainedModel:
    """Loads a checkpoint folder, FP8 or not, into transformers' class in float32 with eager attention.

    Raises ConfigError when the machine's memory cannot hold it, or the class has weights that the checkpoint has not.
    """
    with Checkpoint(model_dir) as checkpoint:
        _check_memory(checkpoint.config)
        model, report = judge_class(checkpoint.config).from_pretrained(
            None,
            config=hugging_face_config(checkpoint),
            state_dict=_fused(dequantized_state_dict(checkpoint), checkpoint.config),
            dtype=torch.float32,
            output_loading_info=True,
        )
    _check_loaded(model, report)
    return model.eval()


def _fused(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers 5 has one tensor for the experts of a layer; it makes it itself for some of the classes only."""
    if not hasattr(judge_class(config).config_class, "rope_parameters"):
        return state_dict
    for layer in filter(config.has_experts, range(config.num_hidden_layers)):
        prefix = f"model.layers.{layer}.mlp.experts."
        for fused, projections in _FUSED.items():
            names = [[f"{prefix}{e}.{p}.weight" for p in projections] for e in range(config.n_routed_experts)]
            experts = [torch.cat([state_dict.pop(name) for name in of_expert]) for of_expert in names]
            state_dict[prefix + fused] = torch.stack(experts)
    return state_dict


def _check_loaded(model: PreTrainedModel, report: dict[str, Any]) -> None:
    """transformers fills what it misses with random numbers, and leaves out what it does not know."""
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    keys = ("missing_keys", "mismatched_keys", "unexpected_keys")
    odd = sorted(str(name) for key in keys for name in report[key] if sizes.get(name) != 0)
    if odd:
        raise ConfigError(
            f"config.json: transformers' {type(model).__name__} is another model: {odd[0]} and {len(odd) - 1} more "
            "weights are in one of the two only, or of another shape; is moe_layer_freq not 1?"
        )


def _check_memory(config: ModelConfig) -> None:
    needed = sum(spec.numel for spec in model_layout(config)) * torch.float32.itemsize
    remedy = "compare with saved outputs instead (inference_demo: --expected-outputs-path)"
    check_memory(needed, "Hugging Face's model in float32", remedy)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Logits float32 [S, vocab] after each token of one sequence, unpadded and uncached."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0].to(torch.float32)
