"""`nxdi-deepseek verify`: compares rank files with the checkpoint, bit for bit."""

import argparse

from ..checkpoint.verifier import verify_shards
from ..progress_bar import ByteBar, format_bytes, format_seconds
from .arguments import file_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=file_name, help="folder of the Hugging Face checkpoint")
    parser.add_argument("out_dir", type=file_name, help="the OUT_DIR that shard wrote")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--sample", type=float, default=0.01, help="share of the regions to recompute, at random")
    share.add_argument("--full", action="store_true", help="recompute all of them, and the manifest's checksums")
    parser.add_argument("--jobs", type=int, help="threads; one per core if not given")


def run(args: argparse.Namespace) -> int:
    sample = 1.0 if args.full else args.sample
    with ByteBar("verify") as progress:
        summary = verify_shards(args.model_dir, args.out_dir, sample, args.jobs, progress)
    print(
        f"{summary.files} files: {format_bytes(summary.bytes)} compared, all equal, {format_seconds(summary.seconds)}"
    )
    return 0
