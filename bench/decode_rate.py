"""Decoding and prefill of the embedded runtime against transformers' DeepseekV3ForCausalLM, on the CPU.

Both run the same random float32 weights of a model of a few hundred million parameters with the released head sizes.
Prints time of the prompt, tokens per second, bytes of the cache and growth of the process's memory at each context,
with ratios to transformers as installed, with its defaults for attention, experts and cache. It takes the prompt in
chunks of 1024 tokens, since the scores of a long one at once would not fit in memory.

Both sides decode in turns, one step each, so that a busy machine slows both alike; tokens per second are those of the
median step. Where other processes take the cores, compare with `--threads 1`: several threads wait for the slowest of
them at every operation. The memory is that of the prompt and one step; our cache is allocated before, so it is added to
our growth.

    python bench/decode_rate.py [--contexts 128,2048,8192] [--new-tokens 16] [--threads 2]
"""

import argparse
import gc
import inspect
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
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


PROMPT_CHUNK = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="128,2048,8192")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as model_dir:
        write_checkpoint(model_dir, CONFIG)
        model = hugging_face_model(model_dir)
        model.set_attn_implementation("sdpa")  # transformers' default; the reference is loaded with eager attention
        print_setting(model)
        for context in map(int, args.contexts.split(",")):
            prompt = torch.randint(2, CONFIG["vocab_size"], (1, context), generator=torch.Generator().manual_seed(0))
            ours = Ours(load_ours(model_dir, context + args.new_tokens + 1))
            theirs = Theirs(model)
            for side in (theirs, ours):
                side.prefill(prompt)
            for _ in range(args.new_tokens):
                for side in (theirs, ours):
                    side.decode()
            print(format_row(context, theirs, ours), flush=True)
            del theirs, ours
            gc.collect()


def print_setting(model: torch.nn.Module) -> None:
    parameters = sum(tensor.numel() for tensor in model.parameters())
    experts = getattr(model.config, "_experts_implementation", "a loop")  # transformers 4 has no choice
    print(f"{parameters / 1e6:.0f} M parameters, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"baseline: transformers {transformers.__version__} DeepseekV3ForCausalLM, DynamicCache, "
        f"attention {model.config._attn_implementation}, experts {experts}\n"
    )
    columns = ("prefill s", "tokens/s", "cache MB", "peak MB")
    print("context" + "".join(f"{name + ': theirs':>20} {'ours':>7} {'ratio':>6}" for name in columns))


def load_ours(model_dir: str, seq_len: int) -> NeuronDeepseekV3ForCausalLM:
    neuron_config = DeepseekV3NeuronConfig(batch_size=1, seq_len=seq_len, torch_dtype=torch.float32)
    config = DeepseekV3InferenceConfig(neuron_config, load_config=load_pretrained_config(model_dir))
    model = NeuronDeepseekV3ForCausalLM(model_dir, config)
    model.load()
    return model


class Side:
    """One model during one context: its newest token, and what was measured."""

    def __init__(self) -> None:
        self.token: torch.Tensor | None = None
        self.decode_seconds: list[float] = []

    def next_token(self, ids: torch.Tensor) -> torch.Tensor:
        """The greedy token [1, 1] after ids [1, S], which follow all earlier ones."""
        raise NotImplementedError

    def cache_bytes(self) -> int:
        raise NotImplementedError

    def prefill(self, prompt: torch.Tensor) -> None:
        """The prompt, and a first step that counts for memory only, since it allocates more than later ones."""

        def run() -> None:
            self.prefill_seconds = self._timed(prompt)
            self._timed(self.token)

        self.peak_bytes = memory_growth(run)

    def decode(self) -> None:
        self.decode_seconds.append(self._timed(self.token))

    def _timed(self, ids: torch.Tensor) -> float:
        start = time.perf_counter()
        self.token = self.next_token(ids)
        return time.perf_counter() - start


class Theirs(Side):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.cache = model, transformers.DynamicCache(config=model.config)
        parameters = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5

    @torch.no_grad()
    def next_token(self, ids: torch.Tensor) -> torch.Tensor:
        for chunk in ids.split(PROMPT_CHUNK, dim=1):
            output = self.model(chunk, use_cache=True, logits_to_keep=1, **{self.cache_argument: self.cache})
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Ours(Side):
    def __init__(self, model: NeuronDeepseekV3ForCausalLM):
        super().__init__()
        self.model, self.position = model, 0

    def next_token(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(self.position, self.position + ids.shape[1])[None]
        self.position += ids.shape[1]
        return self.model(input_ids=ids, position_ids=positions).logits[:, -1].argmax(-1, keepdim=True)

    def cache_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.model.kv_mgr.past_key_values)


def memory_growth(run: Callable[[], None]) -> int:
    """By how many bytes the process's resident memory grows at most during run()."""
    gc.collect()
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def format_row(context: int, theirs: Side, ours: Side) -> str:
    """Ratios: how many times longer, slower or larger theirs is."""
    seconds = [statistics.median(side.decode_seconds) for side in (theirs, ours)]
    caches = [side.cache_bytes() / 1e6 for side in (theirs, ours)]
    peaks = [theirs.peak_bytes / 1e6, ours.peak_bytes / 1e6 + caches[1]]
    columns = [
        (theirs.prefill_seconds, ours.prefill_seconds, theirs.prefill_seconds / ours.prefill_seconds),
        (1 / seconds[0], 1 / seconds[1], seconds[0] / seconds[1]),
        (*caches, caches[0] / caches[1]),
        (*peaks, peaks[0] / peaks[1]),
    ]
    return f"{context:>7}" + "".join(f"{a:>20.2f} {b:>7.2f} {ratio:>6.2f}" for a, b, ratio in columns)


if __name__ == "__main__":
    main()
