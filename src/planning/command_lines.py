"""The command lines that shard, try and serve the shape of a plan."""

import json
import shlex

from ..model_config import ModelConfig
from ..speculation import MTP
from ..weight_forms import BF16
from .rank_memory import CompiledShape

_COMPILED = "compiled"  # folders that the lines write
_SERVED = "compiled-vllm"


def command_lines(config: ModelConfig, shape: CompiledShape, model_dir: str) -> dict[str, str]:
    """Command lines by what they do. `serve` is left out where prompts are shorter than seq_len and no chunks: vLLM
    sends prompts up to its own limit. inference_demo is left out with kv_seq_shards, for which it has no option."""
    lines = {"shard": _shard(shape, model_dir, _COMPILED)}
    if shape.kv_seq_shards == 1:
        lines["inference_demo"] = _inference_demo(config, shape, model_dir)
    whole_prompts = shape.prompt_length == shape.seq_len or shape.pa_block_size
    if whole_prompts and not shape.speculation_length:  # vLLM's plugin takes no MTP draft
        lines |= {"shard for vLLM": _shard(shape, model_dir, _SERVED), "vLLM": _vllm(shape, model_dir)}
    return lines


def _shard(shape: CompiledShape, model_dir: str, out_dir: str) -> str:
    words = ["nxdi-deepseek", "shard", model_dir, out_dir, "--tp-degree", shape.tp_degree]
    words += ["--speculation", MTP] if shape.speculation_length else []
    return _line(words + ([] if shape.form is BF16 else ["--weights", shape.form.name]))


def _inference_demo(config: ModelConfig, shape: CompiledShape, model_dir: str) -> str:
    words = ["nxdi-deepseek", "inference-demo", "--model-type", config.model_type, "--task-type", "causal-lm", "run"]
    words += ["--model-path", model_dir, "--compiled-model-path", _COMPILED, "--save-sharded-checkpoint"]
    words += ["--tp-degree", shape.tp_degree, "--logical-nc-config", shape.lnc, "--torch-dtype", shape.dtype]
    words += ["--batch-size", shape.batch_size, "--seq-len", shape.seq_len]
    words += ["--max-context-length", shape.prompt_length]
    if shape.pa_block_size:
        words += ["--enable-prefix-caching", "--enable-block-kv-layout"]
        words += ["--pa-block-size", shape.pa_block_size, "--pa-num-blocks", shape.blocks]
    if shape.prompts != shape.batch_size:
        words += ["--is-continuous-batching", "--ctx-batch-size", shape.prompts]
    if shape.speculation_length:
        words += ["--enable-eagle-speculation", "--speculation-length", shape.speculation_length]
        words += ["--draft-model-path", model_dir]
    if shape.form.is_fp8:
        fields = shape.form.neuron_fields(config, shape.tp_degree)
        words += ["--quantized", "--quantization-type", fields["quantization_type"]]
        words += ["--quantization-dtype", fields["quantization_dtype"], "--quantized-checkpoints-path", model_dir]
    words += ["--prompt", "The capital of France is"] * shape.batch_size
    return f"NEURON_LOGICAL_NC_CONFIG={shape.lnc} {_line(words)}"


def _vllm(shape: CompiledShape, model_dir: str) -> str:
    overrides = {"save_sharded_checkpoint": True, "logical_nc_config": shape.lnc}
    overrides |= {"weights": shape.form.name} if shape.form.is_fp8 else {}
    overrides |= {"kv_seq_shards": shape.kv_seq_shards} if shape.kv_seq_shards > 1 else {}
    words = ["vllm", "serve", model_dir, "--tensor-parallel-size", shape.tp_degree, "--max-model-len", shape.seq_len]
    words += ["--max-num-seqs", shape.batch_size]
    if shape.pa_block_size:
        overrides |= {"max_context_length": shape.prompt_length}
        words += ["--enable-prefix-caching", "--block-size", shape.pa_block_size]
        words += ["--num-gpu-blocks-override", shape.blocks]
    else:
        words += ["--no-enable-prefix-caching", "--num-gpu-blocks-override", shape.batch_size]
    words += ["--additional-config", json.dumps({"override_neuron_config": overrides})]
    return f"NEURON_COMPILED_ARTIFACTS={_SERVED} NEURON_LOGICAL_NC_CONFIG={shape.lnc} {_line(words)}"


def _line(words: list[str | int]) -> str:
    return shlex.join(map(str, words))
