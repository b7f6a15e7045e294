"""`nxdi-deepseek shard`: a checkpoint becomes one file per rank, as NxDI's load() takes them."""

import argparse

from ..checkpoint.estimate import estimate_sharding
from ..checkpoint.plan import parse_ranks
from ..checkpoint.sharder import shard_checkpoint
from ..dtypes import MODEL_DTYPES
from ..progress_bar import ByteBar, format_bytes, format_seconds
from ..speculation import MTP
from ..weight_forms import BF16, FORMS
from .arguments import file_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=file_name, help="folder of a Hugging Face checkpoint: FP8, INT4, BF16, FP32")
    parser.add_argument("out_dir", type=file_name, help="gets weights/tp{rank}_sharded_checkpoint.safetensors")
    parser.add_argument("--tp-degree", type=int, required=True, help="number of ranks, 64 on a trn2.48xlarge")
    parser.add_argument("--dtype", choices=MODEL_DTYPES, default="bfloat16")
    parser.add_argument(
        "--weights",
        choices=FORMS,
        default=BF16.name,
        help="routed experts: "
        + "; ".join(f"{form.name}: {form.what}" for form in FORMS.values())
        + " (all else stays in --dtype)",
    )
    parser.add_argument("--ranks", help="write only these, for example 0-7,32")
    parser.add_argument("--jobs", type=int, help="threads; one per core if not given")
    parser.add_argument("--with-mtp", action="store_true", help="write the MTP layers too, to OUT_DIR/mtp/weights")
    parser.add_argument(
        "--speculation",
        choices=(MTP,),
        help="write the MTP layer as a draft beside the model, for a model compiled with enable_eagle_speculation",
    )
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    parser.add_argument("--dry-run", action="store_true", help="check the checkpoint, print sizes and a time estimate")


def run(args: argparse.Namespace) -> int:
    ranks = parse_ranks(args.ranks, args.tp_degree)
    if args.dry_run:
        return _dry_run(args, ranks)
    with ByteBar("shard") as progress:
        summary = shard_checkpoint(
            args.model_dir,
            args.out_dir,
            args.tp_degree,
            args.dtype,
            ranks=ranks,
            jobs=args.jobs,
            resume=args.resume,
            with_mtp=args.with_mtp,
            progress=progress,
            weights=args.weights,
            fused=args.speculation == MTP,
        )
    resumed = f" ({format_bytes(summary.resumed)} were there already)" if summary.resumed else ""
    print(f"{summary.files} files in {', '.join(map(str, summary.folders))}")
    rate = summary.bytes / summary.seconds
    print(f"{format_bytes(summary.bytes)} written{resumed}, {format_seconds(summary.seconds)}, {format_bytes(rate)}/s")
    for line in error_lines(summary.errors):
        print(line)
    return 0


def error_lines(errors: dict[str, float]) -> list[str]:
    """A line per layer with experts: the relative error of FP8 in each projection."""
    layers: dict[str, list[str]] = {}
    for name, error in errors.items():
        layer, _, tensor = name.partition(".mlp.")
        layers.setdefault(layer, []).append(f"{tensor.split('.')[-2]} {error:.2e}")
    return [f"error of FP8  {layer:<10} {', '.join(found)}" for layer, found in layers.items()]


def _dry_run(args: argparse.Namespace, ranks: list[int]) -> int:
    fused = args.speculation == MTP
    lengths = args.model_dir, args.out_dir, args.tp_degree, args.dtype
    estimate = estimate_sharding(*lengths, ranks, args.jobs, args.with_mtp, args.weights, fused)
    enough = "enough" if estimate.free >= estimate.bytes else "NOT ENOUGH"
    print(f"checkpoint    in order, {format_bytes(estimate.source_bytes)}")
    print(f"output        {estimate.files} files of {format_bytes(estimate.file_bytes)} each")
    print(f"disk needed   {format_bytes(estimate.bytes)}, {format_bytes(estimate.free)} free: {enough}")
    print(f"measured      {format_bytes(estimate.rate)}/s over a probe of {format_bytes(estimate.probed)}")
    print(f"time          about {format_seconds(estimate.bytes / estimate.rate)}")
    return 0 if estimate.free >= estimate.bytes else 1
