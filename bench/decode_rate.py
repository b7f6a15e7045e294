"""Decoding and prefill of the embedded runtime against transformers' DeepseekV3ForCausalLM, on the CPU.

Both run the same random float32 weights of a model of a few hundred million parameters with the released head sizes.
Prints time of the prompt, tokens per second, bytes of the cache and growth of the process's memory at each context,
with ratios to transformers, which takes the prompt in chunks of 1024 tokens, since the scores of a long one at once
would not fit in memory. Our cache is allocated before the run, so it is added to our growth.

    python bench/decode_rate.py [--contexts 128,2048,8192] [--new-tokens 8]
"""

import argparse
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nxdi_deepseek.accuracy.reference import hugging_face_model
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.example_configs import DEMO_CONFIG
from nxdi_deepseek.modeling_deepseek import (
    DeepseekV3InferenceConfig,
    DeepseekV3NeuronConfig,
    NeuronDeepseekV3ForCausalLM,
    load_pretrained_config,
)

# The released head sizes and routing (256 experts, 8 of them from 4 of 8 groups); everything else is smaller.
CONFIG = {field: value for field, value in DEMO_CONFIG.items() if field != "quantization_config"} | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 128,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 384,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 8192,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="128,2048,8192")
    parser.add_argument("--new-tokens", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as model_dir:
        write_checkpoint(model_dir, CONFIG)
        theirs = hugging_face_model(model_dir)
        theirs.set_attn_implementation("sdpa")  # transformers' default; the reference is loaded with eager attention
        parameters = sum(tensor.numel() for tensor in theirs.parameters())
        print(f"{parameters / 1e6:.0f} M parameters, float32, {torch.get_num_threads()} threads")
        print("baseline: transformers DeepseekV3ForCausalLM, DynamicCache, sdpa\n")
        columns = ("prefill s", "tokens/s", "cache MB", "peak MB")
        print("context" + "".join(f"{name + ': theirs':>20} {'ours':>7} {'ratio':>6}" for name in columns))
        for context in map(int, args.contexts.split(",")):
            ours = load_ours(model_dir, context + args.new_tokens + 1)
            prompt = torch.randint(2, CONFIG["vocab_size"], (1, context), generator=torch.Generator().manual_seed(0))
            rows = [
                with_peak_memory(run_theirs, theirs, prompt, args.new_tokens),
                with_peak_memory(run_ours, ours, prompt, args.new_tokens),
            ]
            print(format_row(context, *rows))
            del ours
            gc.collect()


def load_ours(model_dir: str, seq_len: int) -> NeuronDeepseekV3ForCausalLM:
    neuron_config = DeepseekV3NeuronConfig(batch_size=1, seq_len=seq_len, torch_dtype=torch.float32)
    config = DeepseekV3InferenceConfig(neuron_config, load_config=load_pretrained_config(model_dir))
    model = NeuronDeepseekV3ForCausalLM(model_dir, config)
    model.load()
    return model


PROMPT_CHUNK = 1024


@torch.no_grad()
def run_theirs(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prompt, seconds per decoded token, bytes of the cache."""
    state = {}

    def step(ids: torch.Tensor) -> torch.Tensor:
        for chunk in ids.split(PROMPT_CHUNK, dim=1):
            output = model(chunk, past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1)
            state["cache"] = output.past_key_values
        return output.logits[:, -1].argmax(-1, keepdim=True)

    prefill, decode = measure(step, prompt, new_tokens)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in state["cache"].layers)
    return prefill, decode, cache


def run_ours(model: NeuronDeepseekV3ForCausalLM, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, int]:
    position = 0

    def step(ids: torch.Tensor) -> torch.Tensor:
        nonlocal position
        positions = torch.arange(position, position + ids.shape[1])[None]
        position += ids.shape[1]
        return model(input_ids=ids, position_ids=positions).logits[:, -1].argmax(-1, keepdim=True)

    prefill, decode = measure(step, prompt, new_tokens)
    return prefill, decode, sum(tensor.nbytes for tensor in model.model.kv_mgr.past_key_values)


def measure(step: Callable[[torch.Tensor], torch.Tensor], prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    start = time.perf_counter()
    token = step(prompt)
    prefill = time.perf_counter() - start
    token = step(token)  # warm-up: the first step allocates
    start = time.perf_counter()
    for _ in range(tokens):
        token = step(token)
    return prefill, (time.perf_counter() - start) / tokens


def with_peak_memory(run: Callable[..., tuple[float, float, int]], *args: Any) -> tuple[float, float, int, int]:
    """run(*args), and by how many bytes the process's resident memory grew at most meanwhile."""
    gc.collect()
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run(*args)
    finally:
        done.set()
        watcher.join()
    return *result, peak


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def format_row(context: int, theirs: tuple[float, float, int, int], ours: tuple[float, float, int, int]) -> str:
    """Ratios: how many times longer, slower or larger theirs is."""
    ours_peak = ours[3] + ours[2]
    columns = [
        (theirs[0], ours[0], theirs[0] / ours[0]),
        (1 / theirs[1], 1 / ours[1], theirs[1] / ours[1]),
        (theirs[2] / 1e6, ours[2] / 1e6, theirs[2] / ours[2]),
        (theirs[3] / 1e6, ours_peak / 1e6, theirs[3] / ours_peak),
    ]
    return f"{context:>7}" + "".join(f"{a:>20.2f} {b:>7.2f} {ratio:>6.2f}" for a, b, ratio in columns)


if __name__ == "__main__":
    main()
