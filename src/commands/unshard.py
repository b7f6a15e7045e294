"""`nxdi-deepseek unshard`: rank files back to a Hugging Face checkpoint."""

import argparse

from ..checkpoint.unsharder import unshard
from ..progress_bar import ByteBar, format_bytes
from .arguments import file_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out_dir", type=file_name, help="the OUT_DIR that shard wrote, with the files of all ranks")
    parser.add_argument(
        "model_dir",
        type=file_name,
        help="folder to write: config.json, index and shards in the dtype of the rank files",
    )
    parser.add_argument("--jobs", type=int, help="threads; one per core if not given")


def run(args: argparse.Namespace) -> int:
    with ByteBar("unshard") as progress:
        size = unshard(args.out_dir, args.model_dir, args.jobs, progress)
    print(f"{format_bytes(size)} written to {args.model_dir}")
    return 0
