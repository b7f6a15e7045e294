"""A prompt of 32,768 tokens in chunks on the embedded runtime, against transformers' DeepseekV3ForCausalLM, on the CPU.

The small shipped model in float32, whose YaRN is stretched so that the positions are legal. Ours takes the prompt in
chunks over a cache in blocks; transformers takes it in chunks of 1,024 tokens, since the scores of all at once would not
fit in memory. Prints both times, their ratio, the growth of the process's memory, and how far the logits behind the last
token are apart. Fails where that is more than float32 rounding, or where ours grows by more than 2 GB.

    python bench/long_prompt.py [--tokens 32768] [--chunk 2048] [--threads 2]
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from decode_rate import PROMPT_CHUNK, Theirs, memory_growth
from nxdi_deepseek.accuracy.reference import hugging_face_model
from nxdi_deepseek.modeling_deepseek import (
    DeepseekV3InferenceConfig,
    DeepseekV3NeuronConfig,
    NeuronDeepseekV3ForCausalLM,
    load_pretrained_config,
)
from nxdi_deepseek.tiny_model import TINY_MODEL_DIR

TOLERANCE = 1e-4
MOST_BYTES = 2 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = stretched(Path(folder), args.tokens)
        prompt = torch.randint(2, config["vocab_size"], (1, args.tokens), generator=torch.Generator().manual_seed(0))
        ours, our_bytes, our_seconds = run_ours(folder, prompt, args.chunk)
        theirs, their_bytes, their_seconds = run_theirs(folder, prompt)
    apart = (ours - theirs).abs().max().item()
    print(f"{args.tokens} tokens, {args.threads} threads, torch {torch.__version__}")
    print(f"ours, chunks of {args.chunk}: {our_seconds:.1f} s, memory grew by {our_bytes / 1e6:.0f} MB")
    print(f"transformers, chunks of {PROMPT_CHUNK}: {their_seconds:.1f} s, by {their_bytes / 1e6:.0f} MB")
    print(f"transformers took {their_seconds / our_seconds:.2f} times as long; last logits at most {apart:.1e} apart")
    if apart > TOLERANCE or our_bytes > MOST_BYTES:
        raise SystemExit("outside the bounds")


def stretched(folder: Path, tokens: int) -> dict:
    """The small model in `folder`, its YaRN made to reach `tokens` positions. Returns its config."""
    shutil.copytree(TINY_MODEL_DIR, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = tokens
    config["rope_scaling"]["factor"] = tokens / config["rope_scaling"]["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    return config


def run_ours(folder: str, prompt: torch.Tensor, chunk: int) -> tuple[torch.Tensor, int, float]:
    """Last logits, growth of memory with the cache, seconds."""
    length = prompt.shape[1]
    neuron_config = DeepseekV3NeuronConfig(
        seq_len=length,
        max_context_length=chunk,
        is_prefix_caching=True,
        is_block_kv_layout=True,
        torch_dtype=torch.float32,
    )
    config = DeepseekV3InferenceConfig(neuron_config, load_config=load_pretrained_config(folder))
    model = NeuronDeepseekV3ForCausalLM(folder, config)
    model.load()
    result: list[torch.Tensor] = []
    start = time.perf_counter()
    grown = memory_growth(
        lambda: result.append(model(input_ids=prompt, position_ids=torch.arange(length)[None]).logits)
    )
    seconds = time.perf_counter() - start
    cache = sum(tensor.nbytes for tensor in model.model.kv_mgr.past_key_values)
    return result[0][0, -1], grown + cache, seconds


def run_theirs(folder: str, prompt: torch.Tensor) -> tuple[torch.Tensor, int, float]:
    model = hugging_face_model(folder)
    model.set_attn_implementation("sdpa")
    side = LastLogits(model)
    start = time.perf_counter()
    grown = memory_growth(lambda: side.next_token(prompt))
    return side.logits, grown, time.perf_counter() - start


class LastLogits(Theirs):
    """Keeps the logits behind the last token."""

    @torch.no_grad()
    def next_token(self, ids: torch.Tensor) -> torch.Tensor:
        for chunk in ids.split(PROMPT_CHUNK, dim=1):
            output = self.model(chunk, use_cache=True, logits_to_keep=1, **{self.cache_argument: self.cache})
        self.logits = output.logits[0, -1]
        return self.logits.argmax(-1, keepdim=True)


if __name__ == "__main__":
    main()
