"""Prompts of a command line: text or token ids, and the tokens that end a generation."""

import argparse

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..model_config import ModelConfig
from ..requests import check_token_ids
from ..third_party import encode, load_generation_config, load_tokenizer

# Fields of generation_config.json that make greedy search take another token than the likeliest, with the values that
# change nothing.
_CHANGES_GREEDY_TOKENS = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
} | dict.fromkeys(
    (
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "sequence_bias",
        "watermarking_config",
    ),
    (None,),
)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to complete; repeat it for several")
    prompts.add_argument("--prompt-ids", action="append", help="the same as token ids, for example 5,17,42")
    parser.add_argument(
        "--chat", action="store_true", help="each --prompt is a user's message: apply the tokenizer's chat template"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the folder's tokenizer"
    )


def read_prompts(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase | None, list[list[int]]]:
    """The tokenizer, if the prompts are text, and the token ids of each prompt. Raises ConfigError."""
    if args.prompt:
        tokenizer = load_tokenizer(args.model_dir, args.trust_remote_code)
        return tokenizer, [encode(tokenizer, text, args.chat) for text in args.prompt]
    if args.chat:
        raise ConfigError("--chat needs --prompt: token ids are taken as they are")
    return None, parse_ids(args.prompt_ids)


def parse_ids(texts: list[str], option: str = "--prompt-ids") -> list[list[int]]:
    try:
        return [[int(word) for word in text.replace(",", " ").split()] for text in texts]
    except ValueError as error:
        raise ConfigError(f"{option} takes integers separated by commas ({error})") from None


def check_ids(prompts: list[list[int]], vocab_size: int) -> None:
    """Raises ConfigError for a prompt that is empty or leaves the vocabulary."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i} is empty; give at least one token")
        check_token_ids(prompt, vocab_size)


def read_generation_config(model_dir: str, config: ModelConfig) -> GenerationConfig:
    """generation_config.json where there is one, for its stop tokens; else those of config.json."""
    generation = load_generation_config(model_dir) or GenerationConfig(eos_token_id=list(config.eos_token_id) or None)
    if generation.pad_token_id is None:
        generation.pad_token_id = config.pad_token_id
    # Sampling is the command line's business.
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, 1.0, 1.0, 50
    return generation


def check_plain_greedy(generation: GenerationConfig) -> None:
    """Raises ConfigError where `generate` would follow the file to other tokens than the likeliest ones."""
    for name, neutral in _CHANGES_GREEDY_TOKENS.items():
        value = getattr(generation, name, None)
        if value not in neutral:
            raise ConfigError(
                f"generation_config.json: {name}={value!r} changes greedy tokens, and golden records the likeliest; "
                f"remove it (--min-new-tokens is golden's own)"
            )


def stop_tokens(generation: GenerationConfig) -> list[int]:
    tokens = generation.eos_token_id
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
