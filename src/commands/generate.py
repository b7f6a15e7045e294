"""`nxdi-deepseek generate`: completes prompts with a checkpoint folder."""

import argparse
import contextlib
import math
import os

import torch
from transformers import set_seed

from .. import backend
from ..application import NeuronDeepseekV3ForCausalLM
from ..config import DeepseekV3InferenceConfig, DeepseekV3NeuronConfig, load_pretrained_config
from ..device_graphs import process
from ..errors import ConfigError
from ..paged_fields import DEFAULT_BLOCK_SIZE
from ..streaming import BatchStreamer, TextPrinter
from ..weight_forms import BF16
from .arguments import (
    add_device_graphs,
    add_weights,
    file_name,
    non_negative_float,
    non_negative_int,
    positive_int,
    probability,
    seed,
)
from .prompts import add_prompt_arguments, check_ids, read_generation_config, read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=file_name, help="folder of a Hugging Face checkpoint")
    add_prompt_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, default=64)
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.0, help="0 (the default) picks the likeliest token"
    )
    parser.add_argument("--top-p", type=probability, default=1.0)
    parser.add_argument("--top-k", type=non_negative_int, default=50, help="0 keeps all tokens (default 50)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--seq-len", type=positive_int, help="bound of prompt and new tokens; what they need if not given"
    )
    parser.add_argument("--tp-degree", type=positive_int, default=1, help="under torchrun: its number of processes")
    parser.add_argument(
        "--chunk",
        type=positive_int,
        metavar="TOKENS",
        help="compute prompts this many tokens at a time, and what several begin with once (a cache in blocks)",
    )
    add_weights(parser)
    add_device_graphs(parser)


def run(args: argparse.Namespace) -> int:
    if os.environ.get("RANK", "0") == "0":
        return _generate(args)
    # Every rank of torchrun computes the same tokens; one prints them.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    print(backend.describe())
    tokenizer, prompts = read_prompts(args)
    lengths = args.max_new_tokens, args.dtype, args.seq_len, args.tp_degree
    model = load_model(args.model_dir, prompts, *lengths, weights=args.weights, chunk=args.chunk)
    input_ids, attention_mask = right_pad(prompts, model.config)
    adapter = backend.HuggingFaceGenerationAdapter(model)
    adapter.generation_config = read_generation_config(args.model_dir, model.config.model)
    set_seed(args.seed)
    sampling = {"do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    printer = TextPrinter(tokenizer, len(prompts))
    adapter.generate(input_ids, attention_mask=attention_mask, streamer=BatchStreamer(printer), **sampling)
    if model.paged:
        print(f"prompts: {model.paged.computed} tokens computed, {model.paged.reused} found in the cache")
    return 0


def load_model(
    model_dir: str,
    prompts: list[list[int]],
    max_new_tokens: int,
    dtype: str,
    seq_len: int | None,
    tp_degree: int,
    weights: str = BF16.name,
    chunk: int | None = None,
) -> NeuronDeepseekV3ForCausalLM:
    """A model with room for the prompts and `max_new_tokens` more. chunk: tokens of a prompt to compute at a time, in a
    cache in blocks. Raises ConfigError when seq_len is too short, or longer than the model knows positions."""
    needed = max(map(len, prompts)) + max_new_tokens
    if seq_len is not None and needed > seq_len:
        raise ConfigError(f"the longest prompt and --max-new-tokens need {needed} positions, --seq-len is {seq_len}")
    # The experts share out the tokens of a prompt among the ranks; blocks are whole.
    step = math.lcm(tp_degree, DEFAULT_BLOCK_SIZE) if chunk else tp_degree
    needed = -(-needed // step) * step
    blocks = {"is_prefix_caching": True, "is_block_kv_layout": True}
    neuron_config = DeepseekV3NeuronConfig(
        batch_size=len(prompts),
        seq_len=seq_len or needed,
        torch_dtype=getattr(torch, dtype),
        tp_degree=tp_degree,
        weights=weights,
        **blocks | {"max_context_length": min(chunk, seq_len or needed)} if chunk else {},
    )
    config = DeepseekV3InferenceConfig(neuron_config, load_config=load_pretrained_config(model_dir))
    check_ids(prompts, config.vocab_size)
    known = config.model.max_position_embeddings
    if neuron_config.seq_len > known:
        raise ConfigError(
            f"{neuron_config.seq_len} positions are needed, max_position_embeddings is {known}; take fewer"
        )
    model = NeuronDeepseekV3ForCausalLM(str(model_dir), config)
    if process.is_prepared():
        from ..device_graphs.graph_report import describe
        from ..device_graphs.loading import load_on_device_graphs

        print(describe(load_on_device_graphs(model)), end="\n\n")
    else:
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
