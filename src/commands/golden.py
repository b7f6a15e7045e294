"""`nxdi-deepseek golden`: what Hugging Face's modules say, for a checkpoint of any size."""

import argparse
import sys
import time

from ..accuracy.golden_run import make_golden
from ..accuracy.recording import Entry, Rule
from ..checkpoint.folder import Checkpoint
from ..dtypes import model_dtype
from ..errors import ConfigError
from .arguments import file_name, non_negative_int, positive_int
from .prompts import (
    add_prompt_arguments,
    check_ids,
    check_plain_greedy,
    parse_ids,
    read_generation_config,
    read_prompts,
    stop_tokens,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=file_name, help="folder of a Hugging Face checkpoint, FP8 or not")
    add_prompt_arguments(parser)
    parser.add_argument(
        "--continuation",
        action="append",
        help="what is expected to follow the prompt of the same number, text or ids as the prompts: saves passes over "
        "the weights as far as it is right, and changes no result",
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=32)
    parser.add_argument(
        "--min-new-tokens", type=non_negative_int, default=0, help="rule out stop tokens before; inference_demo does"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trace", action="store_true", help="also write what every module gives, for compare --bisect")
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, help="of the inference_demo run to check (default 1)"
    )
    parser.add_argument("--out", type=file_name, required=True, help="folder to write; an unfinished run there goes on")


def run(args: argparse.Namespace) -> int:
    with Checkpoint(args.model_dir) as checkpoint:
        config = checkpoint.config
        prompts, drafts = _prompts(args)
        check_ids([prompt.prompt for prompt in prompts], config.vocab_size)
        check_ids([draft for draft in drafts if draft], config.vocab_size)
        generation = read_generation_config(args.model_dir, config)
        check_plain_greedy(generation)
        stops = stop_tokens(generation)
        rule = Rule(args.max_new_tokens, tuple(stops), args.min_new_tokens)
        dtype = model_dtype(args.dtype)
        recording = make_golden(
            checkpoint, prompts, drafts, rule, args.out, dtype, args.trace, args.batch_size, _Reporter()
        )
    for entry in recording.entries:
        print(" ".join(map(str, entry.tokens)))
    print(f"{args.out}: logits of {sum(len(entry.tokens) for entry in recording.entries)} tokens by {recording.source}")
    return 0


def _prompts(args: argparse.Namespace) -> tuple[list[Entry], list[list[int]]]:
    texts, continuations = args.prompt or args.prompt_ids, args.continuation or []
    if len(continuations) > len(texts):
        raise ConfigError(f"{len(continuations)} --continuation for {len(texts)} prompts; give at most one for each")
    tokenizer, ids = read_prompts(args)
    prompts = [Entry(text if tokenizer else None, tokens) for text, tokens in zip(texts, ids, strict=True)]
    if tokenizer:
        drafts = [tokenizer(text, add_special_tokens=False).input_ids for text in continuations]
    else:
        drafts = parse_ids(continuations, "--continuation")
    return prompts, drafts + [[]] * (len(texts) - len(continuations))


class _Reporter:
    """Lines on stderr with the time since the start; on a terminal each takes the place of the last."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        start, end = ("\r\033[K", "") if sys.stderr.isatty() and ": layer " in line else ("\r", "\n")
        print(f"{start}{minutes:4}:{seconds:02} {line}", end=end, file=sys.stderr, flush=True)
