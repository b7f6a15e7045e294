"""`nxdi-deepseek demo`: the whole path on a small checkpoint, judged by Hugging Face's own model."""

import argparse
import tempfile

import torch

from .. import backend
from ..reference import hugging_face_model, reference_logits
from ..synthetic import DEMO_CONFIG, write_checkpoint
from .generate import load_model, right_pad

PROMPT_LENGTHS = (3, 11, 6)
# float32 keeps about 7 digits; the sums of some hundred products in a dozen steps cost two to three of them.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and prompts")
    parser.add_argument("--max-new-tokens", type=int, default=24)


def run(args: argparse.Namespace) -> int:
    print(backend.describe())
    generator = torch.Generator().manual_seed(args.seed)
    vocab = DEMO_CONFIG["vocab_size"]
    prompts = [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    with tempfile.TemporaryDirectory() as model_dir:
        write_checkpoint(model_dir, DEMO_CONFIG, args.seed)
        print(f"checkpoint: FP8 in blocks of 128x128, {DEMO_CONFIG['num_hidden_layers']} layers and one MTP layer")
        tokens, logits = generate(model_dir, prompts, args.max_new_tokens)
        golden_model = hugging_face_model(model_dir)
    print(f"generated: {len(prompts)} prompts of {', '.join(map(str, PROMPT_LENGTHS))} tokens, in one batch, greedily")
    goldens = [golden_logits(golden_model, prompt, row) for prompt, row in zip(prompts, tokens.tolist(), strict=True)]
    return report(tokens, logits, torch.stack(goldens))


def generate(model_dir: str, prompts: list[list[int]], max_new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, T] and the logits that chose them, float32 [B, T, vocab]."""
    model = load_model(model_dir, prompts, max_new_tokens, "float32", seq_len=None, tp_degree=1)
    input_ids, attention_mask = right_pad(prompts, model.config)
    adapter = backend.HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None  # random weights mean nothing by it
    output = adapter.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, input_ids.shape[1] :], torch.stack(output.logits, dim=1)


def golden_logits(model: torch.nn.Module, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """Hugging Face's logits [T, vocab] at the positions that chose `generated`, teacher-forced with it."""
    return reference_logits(model, prompt + generated)[len(prompt) - 1 : -1]


def report(tokens: torch.Tensor, logits: torch.Tensor, goldens: torch.Tensor) -> int:
    """Prints the comparison of logits [B, T, vocab]. Returns 0 when all tokens and logits match, else 1."""
    print("\nprompt position  token  golden logit     our logit  difference  match")
    top1 = goldens.argmax(-1) == tokens
    for row, position in torch.cartesian_prod(torch.arange(tokens.shape[0]), torch.arange(tokens.shape[1])).tolist():
        token = tokens[row, position]
        golden, ours = goldens[row, position, token].item(), logits[row, position, token].item()
        match = "yes" if top1[row, position] else "NO"
        print(f"{row:>6} {position:>8} {token:>6} {golden:>13.6f} {ours:>13.6f} {ours - golden:>11.1e}  {match}")
    difference = (logits - goldens).abs()
    print(f"\ntop-1 agreement: {top1.sum()} of {top1.numel()}")
    print(f"difference over all {difference.numel()} logits: mean {difference.mean():.1e}, max {difference.max():.1e}")
    good = bool(top1.all()) and difference.max().item() < TOLERANCE
    print(f"verdict: {'MATCH' if good else 'NO MATCH'} (same tokens, every logit within {TOLERANCE:.0e})")
    return 0 if good else 1
