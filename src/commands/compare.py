"""`nxdi-deepseek compare`: how far a run of the model is from golden outputs, and where that starts."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .arguments import file_name

if TYPE_CHECKING:
    from ..accuracy.comparison import Comparison
    from ..accuracy.recording import Recording
    from ..application import NeuronDeepseekV3ForCausalLM

# Nothing that imports the backend may be imported before --backend is known.
_BACKEND_VARIABLE = "NXDI_DEEPSEEK_BACKEND"
_COMPILED_CONFIG = "neuron_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("golden", type=file_name, help="folder that `nxdi-deepseek golden` has written")
    parser.add_argument(
        "subject",
        type=file_name,
        metavar="RUN|MODEL_DIR|COMPILED_DIR",
        help="a recorded run, a checkpoint folder to run on the CPU, or what NxDI's compile() has written",
    )
    parser.add_argument("--backend", choices=("embedded", "nxdi"), help="what runs the model (default: NxDI if found)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to run the model in")
    parser.add_argument(
        "--gates", type=file_name, metavar="FILE", help="JSON with the bounds to reach; default: those of the dtype"
    )
    parser.add_argument("--bisect", action="store_true", help="name the first module that is wrong (golden --trace)")
    parser.add_argument(
        "--out", type=file_name, metavar="DIR", help="write report.html, report.json, tokens.csv and the run here"
    )


def run(args: argparse.Namespace) -> int:
    if args.backend:
        os.environ[_BACKEND_VARIABLE] = args.backend
    from ..accuracy.comparison import read_gates
    from ..accuracy.recording import is_recording, load_recording, make_folder
    from ..accuracy.report import print_table, write_report

    golden = load_recording(args.golden)
    if args.bisect and not golden.has_trace:
        raise ConfigError(f"{args.golden}: holds no trace; run golden with --trace")
    gates = read_gates(args.gates) if args.gates else None
    if args.out:
        make_folder(args.out)  # now, not after hours of running
    comparison = (_compare_run if is_recording(args.subject) else _run_model)(args, golden, gates)
    print_table(comparison)
    if args.out:
        write_report(comparison, args.out)
        print(f"report: {os.path.join(args.out, 'report.html')}")
    return 0 if comparison.passed else 1


def _compare_run(args: argparse.Namespace, golden: "Recording", gates: dict[str, float] | None) -> "Comparison":
    from ..accuracy.comparison import DEFAULTS, compare
    from ..accuracy.metrics import coarser
    from ..accuracy.recording import load_recording
    from ..accuracy.tracing import compare_traces

    run = load_recording(args.subject)
    dtype = coarser(golden.dtype, run.dtype)
    if args.bisect and not run.has_trace:
        raise ConfigError(f"{args.subject}: holds no trace; compare with the checkpoint folder instead")
    findings = compare_traces(golden, run.trace, dtype) if args.bisect else None
    comparison = compare(golden, run, gates or DEFAULTS[dtype], findings=findings)
    unmeasured = [name for name in gates or {} if comparison.metrics[name] is None]
    if unmeasured:
        raise ConfigError(
            f"{args.gates}: {', '.join(unmeasured)} cannot be measured on a recorded run; compare with the checkpoint "
            "folder, or leave it out"
        )
    return comparison


def _run_model(args: argparse.Namespace, golden: "Recording", gates: dict[str, float] | None) -> "Comparison":
    from .. import backend
    from ..accuracy.comparison import DEFAULTS
    from ..accuracy.runner import dtype_of, evaluate

    if args.backend not in (None, backend.NAME):
        raise ConfigError(f"--backend {args.backend}: this process runs on {backend.NAME} already")
    print(backend.describe())
    model = _load_model(args, golden)
    return evaluate(model, golden, gates or DEFAULTS[dtype_of(model)], args.bisect)


def _load_model(args: argparse.Namespace, golden: "Recording") -> "NeuronDeepseekV3ForCausalLM":
    from .. import backend
    from ..accuracy.comparison import check_same_model
    from ..accuracy.recording import dimensions, readable
    from ..application import NeuronDeepseekV3ForCausalLM
    from ..config import DeepseekV3InferenceConfig
    from ..model_config import load_model_config
    from .generate import load_model

    if not os.path.exists(os.path.join(args.subject, _COMPILED_CONFIG)):
        check_same_model(golden, dimensions(load_model_config(args.subject)))
        prompts, steps = [entry.prompt for entry in golden.entries], golden.rule().max_new_tokens
        return load_model(args.subject, prompts, steps, args.dtype, seq_len=None, tp_degree=1)
    with readable(Path(args.subject, _COMPILED_CONFIG), "compile again"):
        config = DeepseekV3InferenceConfig.load(args.subject)
    check_same_model(golden, dimensions(config.model))
    model = NeuronDeepseekV3ForCausalLM(args.subject, config)
    needed = max(len(entry.prompt) + len(entry.tokens) for entry in golden.entries)
    if needed > model.neuron_config.max_context_length:
        raise ConfigError(
            f"{args.subject}: compiled for prompts of {model.neuron_config.max_context_length} tokens; golden prompts "
            f"and tokens need {needed} (each step is also run as a prompt)"
        )
    model.load(*([args.subject] if backend.NAME == "nxdi" else []))
    return model
