"""Speculation with the MTP layer of the shipped small model, on the embedded runtime: acceptance, and tokens per second
against plain decoding. A CPU computes each token of a step, so the ratio says nothing of a device.

    OMP_NUM_THREADS=1 python bench/mtp.py
"""

import argparse
import time

import torch
from nxdi_deepseek import backend
from nxdi_deepseek.commands.generate import right_pad
from nxdi_deepseek.modeling_deepseek import (
    DeepseekV3InferenceConfig,
    DeepseekV3NeuronConfig,
    NeuronDeepseekV3ForCausalLM,
    load_pretrained_config,
)
from nxdi_deepseek.tiny_model import TINY_MODEL_DIR, load_goldens


def load(batch, length, seq_len):
    neuron_config = DeepseekV3NeuronConfig(
        batch_size=batch,
        seq_len=seq_len,
        torch_dtype=torch.float32,
        enable_eagle_speculation=True,
        speculation_length=length,
    )
    config = DeepseekV3InferenceConfig(neuron_config, load_config=load_pretrained_config(TINY_MODEL_DIR))
    model = NeuronDeepseekV3ForCausalLM(str(TINY_MODEL_DIR), config)
    model.load()
    return model


def rate(adapter, batch, count, **options):
    """Seconds and tokens of each prompt, one batch after the other; the counts of all."""
    seconds, tokens, accepted, drafted, steps = 0.0, [], 0, 0, 0
    for prompts in batch:
        ids, mask = right_pad(prompts, adapter.neuron_model.config)
        start = time.perf_counter()
        found = adapter.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)
        seconds += time.perf_counter() - start
        tokens.append(found[:, ids.shape[1] :])
        if options:
            counts = adapter.speculation_counts
            accepted, drafted, steps = (accepted + counts.accepted, drafted + counts.drafted, steps + counts.steps)
    return seconds, torch.cat(tokens), (accepted, drafted, steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each of the eight goldens")
    args = parser.parse_args()
    prompts = load_goldens().prompts
    longest = max(map(len, prompts)) + args.tokens + 8
    print("batch  tokens a step drafts  acceptance  tokens per step  tokens/s plain  with MTP  ratio")
    for batch_size in (1, 8):
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        for length in (2, 3):
            adapter = backend.HuggingFaceGenerationAdapter(load(batch_size, length, longest))
            adapter.generation_config.eos_token_id, adapter.generation_config.pad_token_id = None, 0
            rate(adapter, batches[:1], 4)  # warm
            plain, expected, _ = rate(adapter, batches, args.tokens)
            ours, found, (accepted, drafted, steps) = rate(adapter, batches, args.tokens, speculation="mtp")
            assert torch.equal(found, expected), "speculation changed the tokens"
            total = expected.numel()
            print(
                f"{batch_size:5}  {length - 1:20}  {accepted / drafted:10.0%}  {1 + accepted / steps:15.2f}  "
                f"{total / plain:14.1f}  {total / ours:8.1f}  {plain / ours:5.2f}"
            )


if __name__ == "__main__":
    main()
