"""`nxdi-deepseek plan`: what fits on an instance, before anything is compiled."""

import argparse
import json
import os
from pathlib import Path

from ..errors import ConfigError
from ..model_config import CONFIG_JSON, ModelConfig, read_config_file, read_model_config
from ..planning.fitting import possible_tp_degrees
from ..planning.instances import DEFAULT_INSTANCE, DEFAULT_LNC, INSTANCES, Instance, instance_of
from ..planning.plan_picture import save_plan_picture
from ..planning.plan_report import ACCEPTANCE, make_memory_plan, plan_json, plan_text
from ..planning.rank_memory import CompiledShape
from ..planning.shard_choice import AUTO, fastest_shards
from ..speculation import MTP, SPECULATION_LENGTH
from ..weight_forms import BF16, FORMS, weight_form
from .arguments import add_kv_seq_shards, file_name, positive_int, probability


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=file_name, help="folder of a Hugging Face checkpoint, or a config.json alone")
    parser.add_argument("--instance", default=DEFAULT_INSTANCE, help=f"{', '.join(INSTANCES)} (%(default)s)")
    parser.add_argument("--tp-degree", type=positive_int, help="ranks; as many as the instance has if not given")
    parser.add_argument(
        "--lnc", type=int, choices=(1, 2), default=DEFAULT_LNC, help="cores in a logical one (%(default)s)"
    )
    parser.add_argument("--weights", default=BF16.name, help=f"routed experts: {', '.join(FORMS)} (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="sequences at a time (%(default)s)")
    parser.add_argument("--seq-len", type=positive_int, default=512, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--max-context-length", type=positive_int, help="of the longest prompt; seq-len if not given")
    parser.add_argument("--ctx-batch-size", type=positive_int, help="prompts at a time; batch-size if not given")
    parser.add_argument(
        "--block-size", type=positive_int, help="tokens of a block: a cache in blocks, and prompts in chunks"
    )
    parser.add_argument("--num-blocks", type=positive_int, help="blocks; what batch-size and seq-len need if not given")
    add_kv_seq_shards(parser)
    parser.add_argument("--speculation", choices=(MTP,), help="with the MTP layer as a draft beside the model")
    parser.add_argument("--acceptance", type=probability, default=ACCEPTANCE, help="of drafted tokens (%(default)s)")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--png", type=file_name, metavar="FILE", help="a picture too; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where the shape does not fit."""
    path = Path(args.model)
    config = read_model_config(read_config_file(path if path.is_file() else path / CONFIG_JSON))
    instance = instance_of(args.instance)
    folder = path.parent if path.is_file() else path
    plan = make_memory_plan(
        config, _shape(args, config, instance), instance, str(folder), _checkpoint_bytes(path), args.acceptance
    )
    if args.png:
        save_plan_picture(plan, args.png)
    print(json.dumps(plan_json(plan), indent=2) if args.format == "json" else plan_text(plan))
    return 0 if plan.memory.fits else 1


def _shape(args: argparse.Namespace, config: ModelConfig, instance: Instance) -> CompiledShape:
    for option, limit in (("seq_len", config.max_position_embeddings), ("max_context_length", args.seq_len)):
        value = getattr(args, option)
        if value and value > limit:
            what = "max_position_embeddings" if option == "seq_len" else "--seq-len"
            raise ConfigError(f"--{option.replace('_', '-')} {value} is more than {what} {limit}; lower it")
    if args.ctx_batch_size and args.ctx_batch_size > args.batch_size:
        raise ConfigError(f"--ctx-batch-size {args.ctx_batch_size} exceeds --batch-size {args.batch_size}; lower it")
    _check_blocks(args)
    degrees = list(possible_tp_degrees(config, instance.logical_cores(args.lnc)))
    tp_degree, shards = args.tp_degree or max(degrees), args.kv_seq_shards
    if shards == AUTO:
        shards = fastest_shards(config, tp_degree, args.batch_size, args.seq_len, block_size=args.block_size or 0)
    return CompiledShape(
        tp_degree=tp_degree,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        max_context_length=args.max_context_length or 0,
        ctx_batch_size=args.ctx_batch_size or 0,
        form=weight_form(args.weights),
        lnc=args.lnc,
        pa_block_size=args.block_size or 0,
        pa_num_blocks=args.num_blocks or 0,
        kv_seq_shards=shards,
        speculation_length=_speculation_length(args, config),
    )


def _check_blocks(args: argparse.Namespace) -> None:
    size, shards = args.block_size, args.kv_seq_shards
    if args.speculation and (size or shards != 1):
        raise ConfigError("--speculation with --block-size or --kv-seq-shards is not supported; leave one of them out")
    if size and shards != AUTO and size % shards:
        raise ConfigError(f"--block-size {size} is no multiple of --kv-seq-shards {shards}; change one of them")
    if not size:
        if args.num_blocks:
            raise ConfigError("--num-blocks needs --block-size, the tokens of a block")
        return
    for option, value in (("--seq-len", args.seq_len), ("--max-context-length", args.max_context_length)):
        if value and value % size:
            raise ConfigError(f"{option} {value} is no multiple of --block-size {size}; change one of them")
    needed = args.batch_size * (args.seq_len // size)
    if args.num_blocks and args.num_blocks < needed:
        raise ConfigError(
            f"--num-blocks {args.num_blocks} cannot hold {args.batch_size} sequences of {args.seq_len} tokens; "
            f"raise it to {needed}"
        )


def _speculation_length(args: argparse.Namespace, config: ModelConfig) -> int:
    if not args.speculation:
        return 0
    if not config.num_nextn_predict_layers:
        raise ConfigError("config.json: num_nextn_predict_layers is 0: there is no MTP layer to draft with")
    return SPECULATION_LENGTH


def _checkpoint_bytes(path: Path) -> int | None:
    """Of the safetensors files in a folder, None where there are none."""
    if not path.is_dir():
        return None
    return sum(os.path.getsize(file) for file in path.glob("*.safetensors")) or None
