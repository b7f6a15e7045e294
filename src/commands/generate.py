"""`nxdi-deepseek generate`: completes prompts with a checkpoint folder."""

import argparse
import contextlib
import os
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, set_seed

from .. import backend
from ..config import DeepseekV3InferenceConfig, DeepseekV3NeuronConfig, load_pretrained_config
from ..errors import ConfigError
from ..modeling_deepseek import NeuronDeepseekV3ForCausalLM
from ..streaming import TextPrinter, generate_and_print

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", help="folder of a Hugging Face checkpoint")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to complete; repeat it for a batch")
    prompts.add_argument("--prompt-ids", action="append", help="the same as token ids, for example 5,17,42")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) picks the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seq-len", type=int, help="bound of prompt and new tokens; what they need if not given")
    parser.add_argument("--tp-degree", type=int, default=1, help="under torchrun: its number of processes")


def run(args: argparse.Namespace) -> int:
    if os.environ.get("RANK", "0") == "0":
        return _generate(args)
    # Every rank of torchrun computes the same tokens; one prints them.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    print(backend.describe())
    tokenizer = _tokenizer(args.model_dir) if args.prompt else None
    prompts = [tokenizer(text).input_ids for text in args.prompt] if tokenizer else _parse_ids(args.prompt_ids)
    model = load_model(args.model_dir, prompts, args.max_new_tokens, args.dtype, args.seq_len, args.tp_degree)
    input_ids, attention_mask = right_pad(prompts, model.config)
    adapter = backend.HuggingFaceGenerationAdapter(model)
    adapter.generation_config = _generation_config(args.model_dir, model.config)
    set_seed(args.seed)
    sampling = {"do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    printer = TextPrinter(tokenizer, len(prompts))
    generate_and_print(adapter, input_ids, printer, attention_mask=attention_mask, **sampling)
    return 0


def load_model(
    model_dir: str, prompts: list[list[int]], max_new_tokens: int, dtype: str, seq_len: int | None, tp_degree: int
) -> NeuronDeepseekV3ForCausalLM:
    """A model with room for the prompts and `max_new_tokens` more. Raises ConfigError when seq_len is too short."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i} is empty; give at least one token")
    needed = max(map(len, prompts)) + max_new_tokens
    if seq_len is not None and needed > seq_len:
        raise ConfigError(f"the longest prompt and --max-new-tokens need {needed} positions, --seq-len is {seq_len}")
    neuron_config = DeepseekV3NeuronConfig(
        batch_size=len(prompts), seq_len=seq_len or needed, torch_dtype=getattr(torch, dtype), tp_degree=tp_degree
    )
    config = DeepseekV3InferenceConfig(neuron_config, load_config=load_pretrained_config(model_dir))
    _check_ids(prompts, config.vocab_size)
    model = NeuronDeepseekV3ForCausalLM(str(model_dir), config)
    model.to_cpu()
    return model


def right_pad(prompts: list[list[int]], config: DeepseekV3InferenceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, longest prompt]."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)
        attention_mask[row, : len(prompt)] = 1
    return input_ids, attention_mask


def _tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    if not any((Path(model_dir) / file).exists() for file in _TOKENIZER_FILES):
        raise ConfigError(f"{model_dir}: has no tokenizer; give token ids with --prompt-ids 5,17,42")
    return AutoTokenizer.from_pretrained(model_dir)


def _parse_ids(texts: list[str]) -> list[list[int]]:
    try:
        return [[int(word) for word in text.replace(",", " ").split()] for text in texts]
    except ValueError as error:
        raise ConfigError(f"--prompt-ids takes integers separated by commas ({error})") from None


def _check_ids(prompts: list[list[int]], vocab_size: int) -> None:
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < vocab_size:
            raise ConfigError(f"token id {token} is outside the vocabulary of {vocab_size}")


def _generation_config(model_dir: str, config: DeepseekV3InferenceConfig) -> GenerationConfig:
    """generation_config.json where there is one, for its stop tokens; else those of config.json."""
    if (Path(model_dir) / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(model_dir)
    else:
        generation = GenerationConfig(eos_token_id=getattr(config, "eos_token_id", None))
    if generation.pad_token_id is None:
        generation.pad_token_id = config.pad_token_id
    # Sampling is the command line's business.
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, 1.0, 1.0, 50
    return generation
