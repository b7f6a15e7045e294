"""Measure the trained model and its FP8 export on held-out text; prints and writes metrics.json.

python -m tools.train_tiny.evaluate --build build --model src/data/tiny_deepseek_v3
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer

from . import ngram
from .checkpoint import read_dequantized, to_training_names
from .model import TinyDeepseekV3, load_config
from .train import heldout_windows

WINDOW, LONG_WINDOW = 512, 2048
NGRAM_ORDER = 5


def load_model(state):
    """The training model in float32 from weights under training names."""
    model = TinyDeepseekV3(load_config()).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def load_released(folder):
    """The training model in float32 with the dequantized weights of a released folder."""
    return load_model(to_training_names(read_dequantized(folder), load_config().num_hidden_layers))


@torch.no_grad()
def window_statistics(model, window):
    """Per-position figures of one window [1, S + 2] as a dict of [S] tensors (the last has S - 1)."""
    logits, mtp_logits = (part[0] for part in model(window[:, :-1]))
    next_token, after_next = window[0, 1:-1], window[0, 2:]
    guess, draft = logits.argmax(-1), mtp_logits.argmax(-1)
    return {
        "loss": F.cross_entropy(logits, next_token, reduction="none"),
        "mtp_loss": F.cross_entropy(mtp_logits, after_next, reduction="none"),
        "accuracy": guess == next_token,
        "mtp_accuracy": draft == after_next,
        "main_accuracy_after_next": guess == after_next,
        "mtp_acceptance": draft[:-1] == guess[1:],
    }


def measure(model, stream, length):
    """Means of `window_statistics` over a stream in consecutive windows; losses as perplexities."""
    rows = [window_statistics(model, window) for window in heldout_windows(stream, length).split(1)]
    means = {name: torch.cat([row[name].double() for row in rows]).mean().item() for name in rows[0]}
    named = {name.replace("loss", "perplexity"): value for name, value in means.items()}
    return {name: math.exp(value) if "perplexity" in name else value for name, value in named.items()}


def expert_figures(model):
    """Per router (the MTP layer's last): loads over their mean and the spread of the correction bias."""
    rows = []
    for gate in model.gates:
        load = gate.load / gate.load.mean()
        bias = gate.e_score_correction_bias
        rows.append(
            {
                "smallest_load": load.min().item(),
                "largest_load": load.max().item(),
                "bias_spread": (bias.max() - bias.min()).item(),
            }
        )
    return rows


@torch.no_grad()
def greedy_acceptance(model, folder):
    """Share of the golden continuations' tokens that the MTP head, one step ahead, drafts right.

    A draft for token t + 2 reads the hidden state at t and the token at t + 1, which the main head already chose.
    """
    goldens = load_file(folder / "golden.safetensors")
    hits = []
    for ids, length, tokens in zip(
        *(goldens[name] for name in ("prompt_ids", "prompt_lengths", "tokens")), strict=True
    ):
        sequence = torch.cat((ids[:length], tokens))
        drafts = model(sequence[None, :-1])[1][0].argmax(-1)  # [S]: drafts[t] stands for sequence[t + 2]
        hits.append(drafts[length - 1 :] == tokens[1:])
    return torch.cat(hits).double().mean().item()


def baselines(build):
    """Kneser-Ney perplexity, and how often a bigram table guesses the next token, on the full held-out text."""
    arrays = np.load(build / "tokens.npz")
    train, heldout = arrays["train"], arrays["heldout"]
    guesses = ngram.best_successors(train)[heldout[:-1]]
    return {
        "ngram_perplexity": math.exp(ngram.mean_loss(ngram.build(train, NGRAM_ORDER), heldout)),
        "bigram_accuracy": float((guesses == heldout[1:]).mean()),
    }


def excerpt_stream(folder):
    """Token ids of the shipped held-out excerpt."""
    text = (Path(folder) / "heldout_excerpt.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build", type=Path, help="folder of corpus.py and train.py")
    parser.add_argument("--model", required=True, type=Path, help="folder written by export.py and goldens.py")
    args = parser.parse_args()
    heldout = torch.from_numpy(np.load(args.build / "tokens.npz")["heldout"].astype(np.int64))
    excerpt = excerpt_stream(args.model)
    trained, released = load_model(load_file(args.build / "trained.safetensors")), load_released(args.model)
    metrics = {"heldout_tokens": len(heldout), "excerpt_tokens": len(excerpt)}
    for name, model in (("bf16", trained), ("fp8", released)):
        metrics[name] = {"heldout": measure(model, heldout, WINDOW)}
        metrics[name]["experts"] = expert_figures(model)
        metrics[name]["excerpt"] = measure(model, excerpt, WINDOW)
        metrics[name]["heldout_long"] = measure(model, heldout, LONG_WINDOW)
    metrics["fp8"]["greedy_acceptance"] = greedy_acceptance(released, args.model)
    metrics["baselines"] = baselines(args.build)
    (args.model / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
