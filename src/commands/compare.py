"""`nxdi-deepseek compare`: how far a run of the model is from golden outputs, and where that starts."""

import argparse
import os
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..accuracy.compare import Comparison
    from ..accuracy.recording import Recording
    from ..application import NeuronDeepseekV3ForCausalLM

# Nothing that imports the backend may be imported before --backend is known.
_BACKEND_VARIABLE = "NXDI_DEEPSEEK_BACKEND"
_COMPILED_CONFIG = "neuron_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("golden", help="folder that `nxdi-deepseek golden` has written")
    parser.add_argument(
        "subject",
        metavar="RUN|MODEL_DIR|COMPILED_DIR",
        help="a recorded run, a checkpoint folder to run on the CPU, or what NxDI's compile() has written",
    )
    parser.add_argument("--backend", choices=("embedded", "nxdi"), help="what runs the model (default: NxDI if found)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to run the model in")
    parser.add_argument("--gates", metavar="FILE", help="JSON with the bounds to reach; default: those of the dtype")
    parser.add_argument("--bisect", action="store_true", help="name the first module that is wrong (golden --trace)")
    parser.add_argument("--out", metavar="DIR", help="write report.html, report.json, tokens.csv and the run here")


def run(args: argparse.Namespace) -> int:
    if args.backend:
        os.environ[_BACKEND_VARIABLE] = args.backend
    from ..accuracy.recording import is_recording, load_recording
    from ..accuracy.report import print_table, write_report

    golden = load_recording(args.golden)
    if args.bisect and not golden.has_trace:
        raise ConfigError(f"{args.golden}: holds no trace; run golden with --trace")
    comparison = (_compare_run if is_recording(args.subject) else _run_model)(args, golden)
    print_table(comparison)
    if args.out:
        write_report(comparison, args.out)
        print(f"report: {os.path.join(args.out, 'report.html')}")
    return 0 if comparison.passed else 1


def _compare_run(args: argparse.Namespace, golden: "Recording") -> "Comparison":
    from ..accuracy.bisect import compare_traces
    from ..accuracy.compare import compare
    from ..accuracy.recording import load_recording
    from ..accuracy.rounding import coarser

    run = load_recording(args.subject)
    dtype = coarser(golden.dtype, run.dtype)
    if args.bisect and not run.has_trace:
        raise ConfigError(f"{args.subject}: holds no trace; compare with the checkpoint folder instead")
    findings = compare_traces(golden, run.trace, dtype) if args.bisect else None
    return compare(golden, run, _gates(args, dtype), findings=findings)


def _run_model(args: argparse.Namespace, golden: "Recording") -> "Comparison":
    from .. import backend
    from ..accuracy.evaluate import dtype_of, evaluate

    if args.backend not in (None, backend.NAME):
        raise ConfigError(f"--backend {args.backend}: this process runs on {backend.NAME} already")
    print(backend.describe())
    model = _load_model(args, golden)
    return evaluate(model, golden, _gates(args, dtype_of(model)), args.bisect)


def _load_model(args: argparse.Namespace, golden: "Recording") -> "NeuronDeepseekV3ForCausalLM":
    from .. import backend
    from ..application import NeuronDeepseekV3ForCausalLM
    from ..config import DeepseekV3InferenceConfig
    from .generate import load_model

    if not os.path.exists(os.path.join(args.subject, _COMPILED_CONFIG)):
        prompts, steps = [entry.prompt for entry in golden.entries], max(len(entry.tokens) for entry in golden.entries)
        return load_model(args.subject, prompts, steps, args.dtype, seq_len=None, tp_degree=1)
    model = NeuronDeepseekV3ForCausalLM(args.subject, DeepseekV3InferenceConfig.load(args.subject))
    needed = max(len(entry.prompt) + len(entry.tokens) for entry in golden.entries)
    if needed > model.neuron_config.max_context_length:
        raise ConfigError(
            f"{args.subject}: compiled for prompts of {model.neuron_config.max_context_length} tokens; golden prompts "
            f"and tokens need {needed} (each step is also run as a prompt)"
        )
    model.load(*([args.subject] if backend.NAME == "nxdi" else []))
    return model


def _gates(args: argparse.Namespace, dtype: str) -> dict[str, float]:
    from ..accuracy.gates import DEFAULTS, read_gates

    return read_gates(args.gates) if args.gates else DEFAULTS[dtype]
