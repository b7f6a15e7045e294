"""A program of its own: greedy tokens of transformers' class for each folder given, and their logits, into a file.

It knows nothing of this package: transformers reads config.json and the tensors as they are released. Run it with an
interpreter that has transformers 5. A folder holds a checkpoint and prompts.json, lists of token ids.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

# Not in the checkpoint, and zero in the judge: A.X-K1's correction bias.
MAY_BE_MISSING = ("e_score_correction_bias",)


def load(folder):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, report = getattr(transformers, architecture).from_pretrained(folder, **options)
    missing = [name for name in report["missing_keys"] if not name.endswith(MAY_BE_MISSING)]
    wrong = missing or report["mismatched_keys"]
    assert not wrong, f"{folder}: {architecture} does not find {sorted(map(str, wrong))[:4]}"
    return model.eval()


@torch.no_grad()
def golden(model, prompt, new_tokens):
    """Greedy tokens [T] and the logits [T, V] that chose them, from one pass over the whole sequence."""
    options = {"max_new_tokens": new_tokens - 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(torch.tensor([prompt]), **options)
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.argmax(-1), logits


def main(new_tokens, folders):
    torch.set_num_threads(1)
    for folder in map(pathlib.Path, folders):
        model = load(folder)
        rows = [golden(model, prompt, new_tokens) for prompt in json.loads((folder / "prompts.json").read_text())]
        tokens, logits = (torch.stack(part).contiguous() for part in zip(*rows, strict=True))
        save_file({"tokens": tokens, "logits": logits.float()}, folder / "goldens.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
