"""Prompts of a command line: text or token ids, and the tokens that end a generation."""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..model_config import ModelConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to complete; repeat it for several")
    prompts.add_argument("--prompt-ids", action="append", help="the same as token ids, for example 5,17,42")


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    if not any((Path(model_dir) / file).exists() for file in _TOKENIZER_FILES):
        raise ConfigError(f"{model_dir}: has no tokenizer; give token ids with --prompt-ids 5,17,42")
    return AutoTokenizer.from_pretrained(model_dir)


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
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"token id {token} is outside the vocabulary of {vocab_size}")


def read_generation_config(model_dir: str, config: ModelConfig) -> GenerationConfig:
    """generation_config.json where there is one, for its stop tokens; else those of config.json."""
    if (Path(model_dir) / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(model_dir)
    else:
        generation = GenerationConfig(eos_token_id=list(config.eos_token_id) or None)
    if generation.pad_token_id is None:
        generation.pad_token_id = config.pad_token_id
    # Sampling is the command line's business.
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, 1.0, 1.0, 50
    return generation


def stop_tokens(generation: GenerationConfig) -> list[int]:
    tokens = generation.eos_token_id
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
