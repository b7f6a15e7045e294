"""A comparison as a table, as JSON and CSV, and as one HTML file that needs nothing else."""

import csv
import html
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .comparison import Comparison
from .plots import figures
from .recording import make_folder, replacing, save_json

_COLUMNS = ("prompt", "tokens", "top-1", "top-5", "mean |d|", "max |d|", "KL mean", "KL max", "NxDI", "free run")
_LISTED_FLIPS = 20
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2933; max-width: 980px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 1.6em 0 .4em }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #e4e7eb }
th:first-child, td:first-child { text-align: left } .pass { color: #207227 } .fail { color: #b42318 }
pre { white-space: pre-wrap }
.figures { display: flex; flex-wrap: wrap; gap: 12px } svg { border: 1px solid #e4e7eb }
"""


def print_table(comparison: Comparison) -> None:
    rows = [_COLUMNS, *_rows(comparison)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    print(f"golden: {comparison.golden.source}, {comparison.golden.dtype}")
    print(f"run:    {comparison.run.source}, {comparison.run.dtype}")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for line in _lines(comparison):
        print(line)


def write_report(comparison: Comparison, folder: str | Path) -> None:
    """Writes report.json (all but the logits), tokens.csv (a row per token), report.html and the run's recording."""
    folder = make_folder(folder)
    comparison.run.save(folder / "run")
    table = io.StringIO()
    rows = list(_token_rows(comparison))
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(folder / "tokens.csv", table.getvalue())
    save_json(_as_json(comparison), folder / "report.json")
    _write(folder / "report.html", _as_html(comparison))


def _rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for i, prompt in enumerate(comparison.prompts):
        tokens, count = prompt.tokens, len(prompt.verdicts)
        yield (
            str(i),
            str(count),
            f"{int(tokens['top1'].sum())}/{count}",
            f"{int(tokens['top5'].sum())}/{count}",
            f"{tokens['mean_difference'].mean():.1e}",
            f"{tokens['max_difference'].max():.1e}",
            f"{tokens['kl'].mean():.1e}",
            f"{tokens['kl'].max():.1e}",
            f"{sum(verdict.passed for verdict in prompt.verdicts)}/{count}",
            f"{prompt.free_run.length}/{prompt.free_run.of}",
        )


def _lines(comparison: Comparison) -> Iterator[str]:
    """What a reader must know beyond the table."""
    for i, prompt in enumerate(comparison.prompts):
        free = prompt.free_run
        if free.margin is not None:
            kind = "a tie: rounding alone may decide" if free.is_tie else "not a tie"
            yield f"prompt {i}: free run leaves golden at token {free.length}, golden margin {free.margin:.1e}, {kind}"
    yield ", ".join(f"{name} {_number(value)}" for name, value in comparison.metrics.items())
    if comparison.findings:
        flips, origin = comparison.findings.flips, comparison.findings.origin
        yield f"trace: {origin or 'every module within rounding of golden'}"
        if flips:
            kinds = Counter(flip.kind for flip in flips)
            yield f"other experts chosen: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
        yield from (f"  {flip}" for flip in flips[:_LISTED_FLIPS])
    for gate, why in comparison.failures.items():
        yield f"FAILED {gate}: {why}"
    yield f"verdict: {'PASS' if comparison.passed else 'FAIL'} ({len(comparison.gates)} gates)"


def _token_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for i, prompt in enumerate(comparison.prompts):
        columns = {name: values.tolist() for name, values in prompt.tokens.items()}
        for position, verdict in enumerate(prompt.verdicts):
            row = {"prompt": i, "position": position} | {name: values[position] for name, values in columns.items()}
            errors = {f"nxdi_error_{k}": error for k, error in verdict.errors.items()}
            yield row | {"nxdi_passed": verdict.passed, "nxdi_divergence": verdict.divergence} | errors


def _as_json(comparison: Comparison) -> dict[str, Any]:
    findings = comparison.findings
    if findings:
        trace = {"origin": findings.origin and {"name": findings.origin.name} | asdict(findings.origin)}
        trace |= {"growth": findings.growth, "flips": [asdict(flip) for flip in findings.flips]}
    return {
        "passed": comparison.passed,
        "golden": {"source": comparison.golden.source, "dtype": comparison.golden.dtype},
        "run": {"source": comparison.run.source, "dtype": comparison.run.dtype},
        "metrics": comparison.metrics,
        "gates": comparison.gates,
        "failures": comparison.failures,
        "free_run": [asdict(prompt.free_run) for prompt in comparison.prompts],
        "trace": trace if findings else None,
    }


def _as_html(comparison: Comparison) -> str:
    """No script, no link: styles and figures are in the file."""
    verdict = "pass" if comparison.passed else "fail"
    parts = [
        f"<h1>DeepSeek-V3 accuracy: <span class={verdict}>{verdict.upper()}</span></h1>",
        f"<p>Golden: {_text(comparison.golden.source)}, {comparison.golden.dtype}. "
        f"Run: {_text(comparison.run.source)}, {comparison.run.dtype}.</p>",
        *(f"<p class=fail>{_text(gate)}: {_text(why)}</p>" for gate, why in comparison.failures.items()),
        "<h2>Prompts</h2>",
        _table(_COLUMNS, _rows(comparison)),
        "<h2>Metrics and gates</h2>",
        _table(("metric", "value", "gate"), _metric_rows(comparison)),
        f"<h2>Figures</h2><div class=figures>{''.join(figures(comparison))}</div>",
        f"<h2>Notes</h2><pre>{_text(chr(10).join(_lines(comparison)))}</pre>",
    ]
    head = f"<meta charset=utf-8><title>Accuracy report</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _metric_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for name, value in comparison.metrics.items():
        bound = comparison.gates.get(name)
        outcome = "" if bound is None or value is None else ": failed" if name in comparison.failures else ": passed"
        yield name, _number(value), "" if bound is None else f"{bound:g}{outcome}"


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(columns, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"


def _text(value: str) -> str:
    return html.escape(value)


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
