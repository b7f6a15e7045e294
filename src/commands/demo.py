"""`nxdi-deepseek demo`: completes prompts with the small trained model, judged by Hugging Face's own model."""

import argparse
import tempfile

import torch
from transformers import PreTrainedTokenizerBase

from .. import backend
from ..accuracy.reference import hugging_face_model, reference_logits
from ..checkpoint.synthetic import write_checkpoint
from ..example_configs import WIDE_CONFIG
from ..streaming import BatchStreamer, TextPrinter
from ..third_party import encode, load_tokenizer
from ..tiny_model import TINY_MODEL_DIR, load_goldens
from .arguments import add_device_graphs, positive_int
from .generate import load_model, right_pad

# float32 keeps about 7 digits; the sums of some hundred products in two dozen steps cost two to three of them.
TOLERANCE = 1e-4
_ALL_RANKS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", help="text to complete instead of the built-in ones; repeatable")
    parser.add_argument("--max-new-tokens", type=positive_int, default=32)
    add_device_graphs(parser)


def run(args: argparse.Namespace) -> int:
    print(backend.describe())
    if args.device_graphs:
        return max(_small_model(args, tp_degree=2), _wide_model(args.max_new_tokens))
    return _small_model(args, tp_degree=1)


def _small_model(args: argparse.Namespace, tp_degree: int) -> int:
    print(
        "model: a small DeepSeek-V3 trained on public-domain novels and tales, FP8 weights; it ships with the package\n"
    )
    tokenizer = load_tokenizer(str(TINY_MODEL_DIR))
    texts = args.prompt or load_goldens().texts[:4]
    prompts = [encode(tokenizer, text) for text in texts]
    printer = TextPrinter(tokenizer, len(prompts), texts)
    tokens, logits = generate(str(TINY_MODEL_DIR), prompts, args.max_new_tokens, tp_degree, printer)
    return report(tokenizer, tokens, logits, golden_logits(str(TINY_MODEL_DIR), prompts, tokens))


def _wide_model(max_new_tokens: int) -> int:
    """At the tensor-parallel degree of a whole trn2.48xlarge."""
    print(f"\nmodel: seeded weights, of sizes that {_ALL_RANKS} ranks can share\n")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, WIDE_CONFIG)
        prompts = [list(range(2, 11)), list(range(100, 117))]
        tokens, logits = generate(folder, prompts, max_new_tokens, _ALL_RANKS, TextPrinter(None, len(prompts)))
        return judge(tokens, logits, golden_logits(folder, prompts, tokens))


def generate(
    model_dir: str, prompts: list[list[int]], max_new_tokens: int, tp_degree: int, printer: TextPrinter
) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams the completions of one batch. Returns greedy tokens [B, T] and the float32 logits [B, T, vocab] that
    chose them."""
    model = load_model(model_dir, prompts, max_new_tokens, "float32", seq_len=None, tp_degree=tp_degree)
    input_ids, attention_mask = right_pad(prompts, model.config)
    adapter = backend.HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None  # all of a batch go on to the end, so that all can be compared
    output = adapter.generate(
        input_ids,
        attention_mask=attention_mask,
        streamer=BatchStreamer(printer),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, input_ids.shape[1] :], torch.stack(output.logits, dim=1)


def golden_logits(model_dir: str, prompts: list[list[int]], tokens: torch.Tensor) -> torch.Tensor:
    """Hugging Face's logits [B, T, vocab] at the positions that chose `tokens` [B, T], teacher-forced with them."""
    model = hugging_face_model(model_dir)
    rows = zip(prompts, tokens.tolist(), strict=True)
    return torch.stack([reference_logits(model, prompt + row)[len(prompt) - 1 : -1] for prompt, row in rows])


def report(
    tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor, logits: torch.Tensor, goldens: torch.Tensor
) -> int:
    """Prints the comparison of logits [B, T, vocab], token by token, and the verdict; returns what `judge` does."""
    print("\nprompt position  token             golden logit     our logit  difference  match")
    top1 = goldens.argmax(-1) == tokens
    for row, position in torch.cartesian_prod(torch.arange(tokens.shape[0]), torch.arange(tokens.shape[1])).tolist():
        token = tokens[row, position]
        golden, ours = goldens[row, position, token].item(), logits[row, position, token].item()
        text, match = repr(tokenizer.decode(token)), "yes" if top1[row, position] else "NO"
        numbers = f"{golden:>10.6f} {ours:>13.6f} {ours - golden:>11.1e}"
        print(f"{row:>6} {position:>8} {token:>6} {text:<12} {numbers}  {match}")
    return judge(tokens, logits, goldens)


def judge(tokens: torch.Tensor, logits: torch.Tensor, goldens: torch.Tensor) -> int:
    """Prints the verdict on logits [B, T, vocab]. Returns 0 when all tokens and logits match, else 1."""
    top1 = goldens.argmax(-1) == tokens
    difference = (logits - goldens).abs()
    print(f"\ntop-1 agreement with Hugging Face: {top1.sum()} of {top1.numel()}")
    print(f"difference over all {difference.numel()} logits: mean {difference.mean():.1e}, max {difference.max():.1e}")
    good = bool(top1.all()) and difference.max().item() < TOLERANCE
    print(f"verdict: {'MATCH' if good else 'NO MATCH'} (same tokens, every logit within {TOLERANCE:.0e})")
    return 0 if good else 1
