"""Tiny members of the DeepSeek-V3 family, and one way to run them on whichever backend is active.

Import this after the backend is decided: for NxDI, after `nxdi.require_nxdi()`.
"""

import os

import torch
from nxdi_deepseek import backend
from nxdi_deepseek.device_graphs import process
from nxdi_deepseek.example_configs import DEMO_CONFIG, RELEASED_CONFIG
from nxdi_deepseek.modeling_deepseek import (
    DeepseekV3InferenceConfig,
    DeepseekV3NeuronConfig,
    NeuronDeepseekV3ForCausalLM,
    load_pretrained_config,
)

YARN = DEMO_CONFIG["rope_scaling"]
RELEASED = RELEASED_CONFIG

# A base in which nothing is equal by chance, without FP8 so that the reference has the very same weights.
V3 = {field: value for field, value in DEMO_CONFIG.items() if field != "quantization_config"}
V3 |= {"num_hidden_layers": 3, "num_nextn_predict_layers": 0}
V3 |= {"hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 72, "vocab_size": 256}

CONFIGS = {
    "v3": V3,
    "five heads": V3 | {"num_attention_heads": 5},
    "v wider than nope": V3 | {"qk_nope_head_dim": 24, "v_head_dim": 40},
    "no q_lora (Moonlight)": V3
    | {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": None,
        "rope_theta": 50000,
        "kv_lora_rank": 40,
    }
    | {"n_shared_experts": 2, "routed_scaling_factor": 2.446},
    "one group (Kimi-K2)": V3
    | {"n_group": 1, "topk_group": 1, "rope_theta": 50000, "n_routed_experts": 24, "routed_scaling_factor": 2.827}
    | {"rope_scaling": YARN | {"factor": 32, "beta_fast": 1, "beta_slow": 1}, "max_position_embeddings": 4096},
    "no rope_scaling": V3 | {"rope_scaling": None},
    "other original_max_position_embeddings": V3
    | {"rope_scaling": YARN | {"original_max_position_embeddings": 48, "factor": 4, "beta_fast": 16, "beta_slow": 2}},
    "mscale differs from mscale_all_dim": V3 | {"rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.707}},
    "no dense layer": V3 | {"first_k_dense_replace": 0},
    "three dense layers": V3 | {"first_k_dense_replace": 3, "num_hidden_layers": 5},
    "two shared experts": V3 | {"n_shared_experts": 2},
    "norm_topk_prob false": V3 | {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "rms_norm_eps 1e-5": V3 | {"rms_norm_eps": 1e-5},
    "attention_bias": V3 | {"attention_bias": True},
    "tied embeddings": V3 | {"tie_word_embeddings": True},
    # With YaRN, transformers 4 is no judge: see members.py.
    "softmax scores, no YaRN (DeepSeek-V2)": V3
    | {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2}
    | {"topk_method": "group_limited_greedy", "rope_scaling": None, "routed_scaling_factor": 4.0},
}


def make_config(fields, **neuron):
    """The config of a model that has no checkpoint."""
    neuron = {"seq_len": 128, "torch_dtype": torch.float32} | neuron
    return DeepseekV3InferenceConfig(DeepseekV3NeuronConfig(**neuron), **fields)


def load_config(model_dir, **neuron):
    neuron = {"seq_len": 128, "torch_dtype": torch.float32} | neuron
    return DeepseekV3InferenceConfig(DeepseekV3NeuronConfig(**neuron), load_config=load_pretrained_config(model_dir))


def load_model(model_dir, **neuron):
    """The model on the active backend, on the CPU, with its weights: device graphs where the process is prepared."""
    model = NeuronDeepseekV3ForCausalLM(str(model_dir), load_config(model_dir, **neuron))
    if process.is_prepared():
        from nxdi_deepseek.device_graphs.loading import load_on_device_graphs

        load_on_device_graphs(model)
        return model
    if backend.NAME == "nxdi":
        from support import nxdi

        nxdi.init_cpu_parallel(model.neuron_config.tp_degree)
    model.to_cpu()
    return model


def init_embedded(tp_degree, init_method):
    """Joins a process group the way torchrun's processes do."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=tp_degree)


class Session:
    """Sequences in the cache slots of a model, each at its own length."""

    def __init__(self, model):
        self.model = model
        self.lengths = {}

    def prefill(self, prompts, slots=None):
        """Starts a sequence in each slot; logits [B, V] after each prompt."""
        slots = list(range(len(prompts))) if slots is None else slots
        width = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        self.lengths.update((slot, len(prompt)) for slot, prompt in zip(slots, prompts, strict=True))
        self.model.reset()
        return self._run(ids, slots, attention_mask=mask, position_ids=positions)

    def decode(self, tokens, slots=None):
        """One more token in each slot; logits [B, V]."""
        slots = list(range(len(tokens))) if slots is None else slots
        positions = torch.tensor([[self.lengths[slot]] for slot in slots])
        for slot in slots:
            self.lengths[slot] += 1
        return self._run(torch.tensor(tokens)[:, None], slots, position_ids=positions)

    @torch.no_grad()
    def _run(self, ids, slots, **inputs):
        return self.model(input_ids=ids, seq_ids=torch.tensor(slots), **inputs).logits[:, -1].clone()


def greedy(model, prompts, new_tokens):
    """Greedy tokens [B, T] and the logits [B, T, V] that chose them."""
    session = Session(model)
    logits = [session.prefill(prompts)]
    while len(logits) < new_tokens:
        logits.append(session.decode(logits[-1].argmax(-1).tolist()))
    logits = torch.stack(logits, dim=1)
    return logits.argmax(-1), logits


def random_prompts(lengths, vocab_size=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]
