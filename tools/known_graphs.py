"""Writes src/data/known_graphs.json: the kinds of instructions in graphs of models that are published as running.

    python tools/known_graphs.py CONTRIB    # CONTRIB: NxDI's contrib/models/DeepSeek-V3

Lowers, with `make graph-env`'s environment, models of NxDI's own and the public DeepSeek-V3 contrib, two layers of each
(the contrib: four) at published sizes: prompts and decoding, logits and tokens chosen on the device.
"""

import importlib
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from nxdi_deepseek.example_configs import RELEASED_CONFIG
from nxdi_deepseek.graph_cost import lowering
from nxdi_deepseek.graph_cost.patterns import INVENTORY, find_patterns

OUTPUT = Path(__file__).parent.parent / "src" / "data" / INVENTORY
TP_DEGREE = 32
COMMON = {
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "sliding_window": None,
    "use_sliding_window": False,
}
LLAMA = {
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "head_dim": 128,
}
QWEN3_MOE = {
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}
MIXTRAL = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
# Name -> module, class, fields of config.json, further fields of the NeuronConfig. The plain expert kernel is not in
# NxD's release, so that the models with experts take the one sharded over blocks, or its stand-in.
_MODELS = "neuronx_distributed_inference.models"
MODELS = {
    "Llama": (f"{_MODELS}.llama.modeling_llama", "NeuronLlamaForCausalLM", COMMON | LLAMA),
    "Qwen2": (f"{_MODELS}.qwen2.modeling_qwen2", "NeuronQwen2ForCausalLM", COMMON | LLAMA),
    "Qwen3": (f"{_MODELS}.qwen3.modeling_qwen3", "NeuronQwen3ForCausalLM", COMMON | LLAMA),
    "Mixtral": (f"{_MODELS}.mixtral.modeling_mixtral", "NeuronMixtralForCausalLM", COMMON | MIXTRAL),
    "Qwen3-MoE": (f"{_MODELS}.qwen3_moe.modeling_qwen3_moe", "NeuronQwen3MoeForCausalLM", COMMON | QWEN3_MOE),
    "DeepSeek-V3 (contrib)": (
        "src.modeling_deepseek",
        "NeuronDeepseekV3ForCausalLM",
        RELEASED_CONFIG | {"num_hidden_layers": 4},
    ),
}
# Phase, length, batch, on_device_sampling_config.
GRAPHS = (
    ("prefill", 128, 1, None),
    ("prefill", 2048, 1, None),
    ("decode", 512, 1, None),
    ("decode", 4096, 8, None),
    ("decode", 512, 1, {"do_sample": False}),
    ("decode", 512, 1, {"do_sample": True, "dynamic": True, "global_topk": 256}),
)


def application(name: str, length: int, batch: int, sampling: dict[str, Any] | None) -> Any:
    module, class_name, fields = MODELS[name]
    causal_lm = getattr(importlib.import_module(module), class_name)
    config_class = causal_lm.get_config_cls()
    fields = {key: value for key, value in fields.items() if key not in ("torch_dtype", "quantization_config")}
    neuron_config = config_class.get_neuron_config_cls()(
        tp_degree=TP_DEGREE,
        seq_len=length,
        max_context_length=length,
        batch_size=batch,
        torch_dtype=torch.bfloat16,
        logical_nc_config=2,
        attn_kernel_enabled=False,  # an opaque kernel says nothing about the operations in its place
        on_device_sampling_config=sampling and dict(sampling),
    )
    return causal_lm("", config_class(neuron_config, load_config=lambda config: vars(config).update(fields)))


def lower(name: str, phase: str, length: int, batch: int, sampling: dict[str, Any] | None) -> list[str]:
    from neuronx_distributed.trace.mock_torchdist import mock_distributed
    from nxdi_deepseek.graph_cost.rank_model import model_instance

    with mock_distributed(TP_DEGREE), torch.no_grad():
        instance, inputs = model_instance(application(name, length, batch, sampling), phase)
        hlo = lowering.trace(instance.module, inputs)
    return [found.pattern for found in find_patterns(hlo)]


def main() -> int:
    sys.path.insert(0, sys.argv[1])
    lowering.prepare_process()
    names, known = list(MODELS), {}
    for name in names:
        for graph in GRAPHS:
            # A process lowers one graph: torch_xla chains the collectives of a process.
            with multiprocessing.get_context("fork").Pool(1) as pool:
                for pattern in pool.apply(lower, (name, *graph)):
                    known.setdefault(pattern, set()).add(names.index(name))
        print(f"{name}: {sum(names.index(name) in models for models in known.values())} kinds", flush=True)
    rows = {pattern: sorted(models) for pattern, models in sorted(known.items())}
    text = ",\n".join(f"    {json.dumps(pattern)}: {models}" for pattern, models in rows.items())
    OUTPUT.write_text(f'{{\n  "models": {json.dumps(names)},\n  "patterns": {{\n{text}\n  }}\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
