"""A plan as a picture."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .plan_report import MemoryPlan


def save_plan_picture(plan: MemoryPlan, path: str | Path) -> None:
    """A PNG: a rank's memory by part, and the largest seq_len by batch_size. Raises ConfigError without matplotlib,
    and where the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--png needs matplotlib, which is not installed; pip install 'nxdi-deepseek[plot]'") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory_axes, fit_axes = figure.subplots(1, 2)
    _draw_memory(memory_axes, plan)
    _draw_fit(fit_axes, plan)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"--png {path}: cannot be written ({error.strerror}); choose another file") from None


def _draw_memory(axes: Any, plan: MemoryPlan) -> None:
    left = 0.0
    for i, (part, size) in enumerate(plan.memory.parts.items()):
        if size:
            axes.barh(0, size / 1e9, left=left, color=f"C{i % 10}", hatch="//" * (i >= 10), label=part)
            left += size / 1e9
    axes.axvline(plan.memory.capacity / 1e9, color="black", linestyle="--", label="a logical core")
    title = f"weights {plan.shape.form.name}, TP {plan.shape.tp_degree}"
    axes.set(yticks=[], ylim=(-0.6, 2.4), xlabel="GB on each rank", title=title)
    axes.legend(fontsize="small", ncols=2, loc="upper left")


def _draw_fit(axes: Any, plan: MemoryPlan) -> None:
    fitting = {batch: length for batch, length in plan.seq_lens.items() if length}
    axes.plot(list(fitting), list(fitting.values()), marker="o")
    for batch, length in fitting.items():
        axes.annotate(f"{length:,}", (batch, length), textcoords="offset points", xytext=(4, 6), fontsize="small")
    if fitting:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(list(fitting), [str(batch) for batch in fitting])
    axes.set(xlabel="batch_size", ylabel="seq_len", title=f"largest that fits on {plan.instance.name}")
