"""Whether rank files are those that a model loads: asked before NxD, which would fail in the middle, or not at all."""

from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from .header import TensorEntry, read_header
from .plan import ShardPlan


def check_rank_files(plan: ShardPlan, ranks: Iterable[int]) -> None:
    """Raises CheckpointError with one line where a rank's file is missing or damaged, or is of another form of weights,
    tp_degree, dtype or model than the plan. Reads headers only."""
    remedy = f"--tp-degree {plan.tp_degree} --weights {plan.form.name} --dtype {str(plan.dtype).removeprefix('torch.')}"
    for rank in ranks:
        path = plan.file(rank).path
        if not path.exists():
            raise CheckpointError(f"{path}: missing; write it with nxdi-deepseek shard {remedy}")
        header = read_header(path)
        if header.problems:
            raise CheckpointError(header.problems[0])
        problem = _problem(plan, plan.file(rank).entries, header.entries)
        if problem:
            raise CheckpointError(f"{path}: {problem}; shard the checkpoint with {remedy}")


def _problem(plan: ShardPlan, expected: Mapping[str, TensorEntry], found: Mapping[str, TensorEntry]) -> str | None:
    expert = next((spec.name for spec in plan.specs if spec.has_experts), None)
    if expert in found and (found[expert].dtype == "F8_E4M3") != plan.form.is_fp8:
        return f"{expert}: {found[expert].dtype}, but the model is configured for weights {plan.form.name}"
    missing = [name for name in expected if name not in found]
    if missing:
        return f"{missing[0]}: missing{_more(missing)}"
    wrong = [name for name, entry in expected.items() if _kind(entry) != _kind(found[name])]
    if wrong:
        pair = (f"{entry.dtype} {list(entry.shape)}" for entry in (found[wrong[0]], expected[wrong[0]]))
        return f"{wrong[0]}: {', the model wants '.join(pair)}{_more(wrong)}"
    return None


def _kind(entry: TensorEntry) -> tuple[str, tuple[int, ...]]:
    return entry.dtype, entry.shape


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
