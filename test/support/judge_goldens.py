"""A program of its own: greedy tokens of transformers' class for each folder given, and their logits, into a file.

It knows nothing of this package: transformers reads config.json and the tensors as they are released. Run it with an
interpreter that has transformers 5. A folder holds a checkpoint and prompts.json, lists of token ids.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

# Not in the checkpoints, and not in the way: A.X-K1's correction bias, which is zero, and most of what sees images.
MAY_BE_MISSING = ("e_score_correction_bias", "vision", "mm_projector", "multi_modal_projector")


def load(folder):
    config = AutoConfig.from_pretrained(folder)
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next(auto for auto in autos if type(config) in auto._model_mapping)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, report = kind.from_pretrained(folder, **options)
    missing = [name for name in report["missing_keys"] if not any(part in name for part in MAY_BE_MISSING)]
    wrong = missing or report["mismatched_keys"]
    assert not wrong, f"{folder}: {type(model).__name__} does not find {sorted(map(str, wrong))[:4]}"
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
