"""Command line `nxdi-deepseek`."""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from .commands.arguments import DEVICE_GRAPHS, OneLineParser
from .device_graphs import process
from .errors import DeepseekError

# Subcommand -> its module in `commands` and its line in --help. Modules are imported when their command runs.
COMMANDS = {
    "demo": ("demo", "complete prompts with the small model that ships along, compare every logit with Hugging Face"),
    "compare": ("compare", "measure how far a run of the model is from golden outputs, and find where it starts"),
    "golden": ("golden", "write reference logits from Hugging Face's modules, layer by layer, in a few GB of memory"),
    "generate": ("generate", "complete prompts with a checkpoint folder"),
    "inspect": ("inspect", "what a checkpoint folder holds, from its headers, and what is wrong with it"),
    "plan": ("plan_memory", "what a rank's memory holds, and what fits on an instance, before anything is compiled"),
    "shard": ("shard", "write one file per rank from a checkpoint folder, as NxDI loads them"),
    "verify": ("verify", "compare rank files with their checkpoint, bit for bit"),
    "unshard": ("unshard", "turn rank files back into a Hugging Face checkpoint"),
    "graph-cost": (
        "count_graphs",
        "what one rank costs as a static graph: FLOPs, bytes, collectives; no device",
    ),
    "inference-demo": ("run_inference_demo", "NxDI's inference_demo, with this model; takes all of its arguments"),
    "without-sdk": ("run_without_sdk", "run a command with NxDI's CPU mode, where the Neuron SDK is not installed"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. A user's mistake becomes one line on stderr and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="nxdi-deepseek", description="DeepSeek-V3 on NeuronX Distributed Inference")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    prog = parser.prog
    try:
        command = parser.parse_args(argv[:1]).command
        prog = f"{prog} {command}"
        if DEVICE_GRAPHS in argv:  # ahead of whatever chooses a backend
            process.prepare()
        return _run(importlib.import_module(f".commands.{COMMANDS[command][0]}", __package__), command, argv[1:])
    except DeepseekError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(module: ModuleType, command: str, argv: list[str]) -> int:
    if hasattr(module, "run_with_own_parser"):
        return module.run_with_own_parser(argv)
    parser = OneLineParser(prog=f"nxdi-deepseek {command}", description=COMMANDS[command][1])
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
