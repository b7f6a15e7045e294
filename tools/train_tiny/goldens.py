"""Golden logits: transformers in float32 on the dequantized checkpoint, greedy, beside the checkpoint.

    python -m tools.train_tiny.goldens --model src/data/tiny_deepseek_v3

golden.safetensors: prompt_ids [P, L] int64 (right-padded with EOS), prompt_lengths [P], tokens [P, T] int64 and
logits [P, T, V] float32; logits[p, t] is the row that chose tokens[p, t]. The prompts' texts are in the metadata.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, __version__

from .checkpoint import read_dequantized
from .reference import load_reference

NEW_TOKENS = 64
# Seven of some fifty tried: those whose greedy continuation neither loops nor meets a near-tie. The eighth is a piece
# of the held-out excerpt, long enough to pass the 512 positions where YaRN's extension begins.
SHORT_PROMPTS = (
    "As soon as breakfast was over, Jane",
    "Emma could not forgive her for",
    "Mrs. Bennet was delighted to hear that",
    "Lady Catherine was not in the habit of",
    "The door of the drawing-room opened, and Mr. Darcy",
    "The tin soldier stood at the window, and",
    '"What can be the matter with her?" said',
)
LONG_PROMPT_CHARS = 2000


def read_prompts(folder):
    """The eight prompts; the long one ends before a space."""
    text = (folder / "heldout_excerpt.txt").read_text()
    return [*SHORT_PROMPTS, text[: text.index(" ", LONG_PROMPT_CHARS)]]


@torch.no_grad()
def complete(model, prompt_ids):
    """Greedy continuation [T] of one prompt [L] and its logits [T, V], from one uncached pass over the whole."""
    ids = torch.tensor([prompt_ids])
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    logits = model(tokens[:, :-1], use_cache=False).logits[0, len(prompt_ids) - 1 :]
    chosen = tokens[0, len(prompt_ids) :]
    if not torch.equal(logits.argmax(-1), chosen):
        raise ValueError("cached and uncached greedy decoding differ: a near-tie, take another prompt")
    return chosen, logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one summation order
    config = json.loads((args.model / "config.json").read_text())
    model = load_reference(config, read_dequantized(args.model))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = read_prompts(args.model)
    prompt_ids = [tokenizer(prompt).input_ids for prompt in prompts]
    completions = [complete(model, ids) for ids in prompt_ids]
    longest = max(map(len, prompt_ids))
    padded = [ids + [tokenizer.eos_token_id] * (longest - len(ids)) for ids in prompt_ids]
    goldens = {
        "prompt_ids": torch.tensor(padded),
        "prompt_lengths": torch.tensor([len(ids) for ids in prompt_ids]),
        "tokens": torch.stack([tokens for tokens, _ in completions]),
        "logits": torch.stack([logits for _, logits in completions]).float(),
    }
    metadata = {"prompts": json.dumps(prompts), "transformers": __version__, "torch": torch.__version__}
    save_file(goldens, args.model / "golden.safetensors", metadata=metadata)
    (args.model / "golden.safetensors").chmod(0o644)
    top2 = goldens["logits"].topk(2).values
    margins = top2[..., 0] - top2[..., 1]
    print(f"top-1 margin: smallest {margins.min():.5f}, below 0.1 at {(margins < 0.1).sum()} of {margins.numel()}")
    for prompt, tokens in zip(prompts, goldens["tokens"], strict=True):
        print(f"\n{prompt[-80:]} | {tokenizer.decode(tokens)}")


if __name__ == "__main__":
    main()
