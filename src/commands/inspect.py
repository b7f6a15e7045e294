"""`nxdi-deepseek inspect`: what a checkpoint folder holds, and what is wrong with it."""

import argparse

from ..checkpoint.summary import CheckpointSummary, inspect_checkpoint
from ..progress_bar import format_bytes
from .arguments import file_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_dir", type=file_name, help="folder of a Hugging Face checkpoint; headers, norms and scales are read"
    )
    parser.add_argument("--full", action="store_true", help="read all weights, to find NaN and infinity in them")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the checkpoint is complete, 1 when it has problems."""
    summary = inspect_checkpoint(args.model_dir, args.full)
    _print_contents(summary)
    for line in summary.ignored:
        print(f"ignored: {line}")
    for problem in summary.problems:
        print(f"problem: {problem}")
    complete = "complete: every tensor is there, in its shape" + (", every weight finite" if args.full else "")
    print(f"{len(summary.problems)} problems" if summary.problems else complete)
    return 1 if summary.problems else 0


def _print_contents(summary: CheckpointSummary) -> None:
    total = sum(summary.bytes_by_dtype.values())
    print(f"parameters    {_count(summary.parameters)}, {_count(summary.active)} active per token")
    print(f"layers        {summary.dense_layers} dense, {summary.moe_layers} with experts")
    print(f"MTP           {_mtp(summary.mtp_layers, summary.mtp_parameters)}")
    print(f"quantization  {summary.quantization}")
    print(f"size          {format_bytes(total)} in {summary.tensors} tensors, {summary.files} files")
    for title, sizes in (("by dtype", summary.bytes_by_dtype), ("by part", summary.bytes_by_part)):
        print(title)
        for name, size in sizes.items():
            print(f"  {name:<16}{format_bytes(size):>10}  {size / max(total, 1):6.1%}")


def _mtp(layers: int, parameters: int) -> str:
    return f"{layers} layers, {_count(parameters)} parameters more" if layers else "none"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
