"""`nxdi-deepseek graph-cost`: what one rank costs as a static graph."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import GraphCostError
from ..example_configs import RELEASED_CONFIG
from ..graph_cost.count import GraphCost
from ..graph_cost.kernels import BLOCKWISE_FORMULA
from ..graph_cost.lowerer import Lowerer
from ..graph_cost.request import PARTS, PHASES, Request
from ..graph_cost.risk import cut, format_risks
from ..graph_cost.speculation_gain import gain_lines
from ..graph_cost.table import format_comparison, format_costs
from ..graph_cost.time_model import Machine, bound
from ..model_config import read_config_json
from ..planning.plan_report import ACCEPTANCE
from ..planning.shard_choice import AUTO, check_divides, fastest_shards
from ..weight_forms import BF16, weight_form
from .arguments import add_kv_seq_shards, add_weights, probability

_GRAPHS = (
    *(f"attention,prefill,{length},1" for length in (512, 2048, 8192, 32768)),
    *(f"moe,prefill,{length},1" for length in (512, 2048)),
    *(f"{part},decode,{cache}" for part in ("attention", "dense", "moe", "model") for cache in ("512,1", "4096,8")),
    "model,prefill,512,1",
)
_RISK_GRAPHS = ("model,prefill,128,1", "model,prefill,2048,1", "model,decode,512,1", "model,decode,4096,8")
# Option -> the field of Machine, its unit, and the unit's size.
_MACHINE_OPTIONS = {
    "--bf16-tflops": ("bf16_flops", "TFLOPS", 1e12),
    "--f32-tflops": ("f32_flops", "TFLOPS", 1e12),
    "--hbm": ("hbm_bytes", "GB/s", 1e9),
    "--link": ("link_bytes", "GB/s", 1e9),
    "--collective": ("collective_seconds", "us", 1e-6),
}

# Fields of the NeuronConfig that the other arguments decide.
_FIXED_FIELDS = {"tp_degree", "seq_len", "max_context_length", "batch_size", "weights", "kv_seq_shards"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts, phases = "|".join(PARTS), "|".join(PHASES)
    parser.add_argument("graphs", nargs="*", metavar="GRAPH", help=f"{parts},{phases},LENGTH,BATCH; a set if not given")
    parser.add_argument("--model-dir", help="folder with a config.json; the released 671B model's if not given")
    parser.add_argument("--tp-degree", type=int, default=64, help="ranks that share the model (%(default)s)")
    add_weights(parser)
    add_kv_seq_shards(parser)
    parser.add_argument("--neuron-config", type=_json_object, default={}, help="more NeuronConfig fields, as JSON")
    parser.add_argument("--impl", help="folder of another package, which holds modeling_deepseek.py; it is run")
    parser.add_argument("--compare", action="store_true", help="with --impl: both, side by side")
    parser.add_argument(
        "--acceptance", type=probability, default=ACCEPTANCE, help="of drafts, for model,speculate graphs (%(default)s)"
    )
    parser.add_argument("--risk", action="store_true", help="kinds of instructions that no known graph has, instead")
    parser.add_argument("--json", action="store_true", help="everything that was counted, as JSON")
    for option, (name, unit, size) in _MACHINE_OPTIONS.items():
        default = getattr(Machine(), name) / size
        parser.add_argument(option, dest=name, type=_positive, default=default, help=f"of a rank, {unit} (%(default)g)")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError("is not a JSON object")
    taken = sorted(_FIXED_FIELDS & fields.keys())
    if taken:
        raise argparse.ArgumentTypeError(f"holds {', '.join(taken)}, which other arguments say")
    return fields


def run(args: argparse.Namespace) -> int:
    if args.compare and not args.impl:
        raise GraphCostError("--compare needs --impl PATH, the package to compare with")
    if args.risk and (args.compare or args.json):
        raise GraphCostError("--risk prints lines of text for one package; leave out --compare and --json")
    requests = _requests(args)
    if args.risk:
        return _tell_risks(requests, args.impl and _package_folder(args.impl))
    machine = _machine(args)
    impls = [_package_folder(args.impl), None] if args.compare else [args.impl and _package_folder(args.impl)]
    costs = [_costs(requests, impl) for impl in impls]
    if args.json:
        print(json.dumps([_record(*row, machine) for row in zip(requests, *costs, strict=True)], indent=2))
        return 0
    print(format_comparison(requests, *costs, machine) if args.compare else format_costs(requests, *costs, machine))
    for line in gain_lines(requests, costs[-1], machine, args.acceptance):
        print(line)
    print(f"rank 0 of {args.tp_degree}, per call. kernel FLOPs: {BLOCKWISE_FORMULA}, padding included.")
    print("dots and expert kernel: on an array of 128 by 128, float32 in four passes; counted, not measured.")
    print("bound: max(FLOPs / peak, bytes / bandwidth) + collectives, from published peaks; no measurement.")
    return 0


def _machine(args: argparse.Namespace) -> Machine:
    return Machine(**{name: getattr(args, name) * size for name, _, size in _MACHINE_OPTIONS.values()})


def _requests(args: argparse.Namespace) -> list[Request]:
    """What to lower, checked as far as it goes before a process starts."""
    config = read_config_json(args.model_dir) if args.model_dir else RELEASED_CONFIG
    neuron_config = args.neuron_config | ({} if args.weights == BF16.name else {"weights": args.weights})
    fields = {"tp_degree": args.tp_degree, "config": config, "neuron_config": neuron_config}
    requests = [Request.parse(text, **fields) for text in args.graphs or (_RISK_GRAPHS if args.risk else _GRAPHS)]
    weight_form(args.weights).check(requests[0].model, args.tp_degree)
    possible = [request for request in requests if request.layer is not None]
    if args.graphs and len(possible) < len(requests):
        missing = next(request for request in requests if request.layer is None)
        raise GraphCostError(f"graph {missing}: the model has no {missing.part} layer; leave it out")
    return [_with_shards(request, args) for request in possible]


def _with_shards(request: Request, args: argparse.Namespace) -> Request:
    """The request with --kv-seq-shards; of `auto`, what a decoding step of its length and batch speaks for."""
    shards = args.kv_seq_shards
    if shards == AUTO:
        shards = fastest_shards(request.model, args.tp_degree, request.batch, request.length, _machine(args))
    check_divides(shards, args.tp_degree)
    if shards == 1:
        return request
    return dataclasses.replace(request, neuron_config=request.neuron_config | {"kv_seq_shards": shards})


def _tell_risks(requests: list[Request], impl: str | None) -> int:
    requests = [dataclasses.replace(request, impl=impl, config=cut(request)) for request in requests]
    with Lowerer() as lowerer:
        found = [lowerer.patterns(request) for request in requests]
    print(format_risks(requests, found))
    return 0


def _package_folder(path: str) -> str:
    """The folder of modeling_deepseek.py: `path` itself, or its src."""
    for folder in (Path(path), Path(path) / "src"):
        if (folder / "modeling_deepseek.py").is_file():
            return str(folder.resolve())
    raise GraphCostError(f"--impl {path}: holds no modeling_deepseek.py; give the folder that does")


def _costs(requests: list[Request], impl: str | None) -> list[GraphCost]:
    with Lowerer() as lowerer:
        return [lowerer.cost(dataclasses.replace(request, impl=impl)) for request in requests]


def _record(request: Request, *rest: Any) -> dict[str, Any]:
    """What was counted for one graph; of two packages, the other's first."""
    *costs, machine = rest
    graph = {"part": request.part, "phase": request.phase, "length": request.length, "batch": request.batch}
    counted = [cost.to_dict() | {"bound_seconds": dataclasses.asdict(bound(cost, machine))} for cost in costs]
    return graph | (counted[0] if len(counted) == 1 else {"other": counted[0], "ours": counted[1]})
