"""A comparison as a table, as JSON and CSV, and as one HTML file that needs nothing else."""

import csv
import html
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import torch

from .comparison import Comparison
from .recording import make_folder, replacing, save_json, stages

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


# The figures, as SVG written by hand: nothing to install, nothing to load.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 470, 290, 62, 42, 34, 14
_COLOURS = ("#2563a8", "#c2571a", "#2e7d4f", "#8a3ffc", "#b42318", "#5f6b7a")
_SCATTER_POINTS = 1500

Point = tuple[float, float]


def figures(comparison: Comparison) -> Iterator[str]:
    """SVG elements: difference per position, golden against ours, and, with traces, error growth and router flips."""
    yield _difference_per_position(comparison)
    yield _scatter(comparison)
    if comparison.findings:
        yield _error_growth(comparison)
        yield _router_flips(comparison)


def _difference_per_position(comparison: Comparison) -> str:
    longest = max(len(prompt.verdicts) for prompt in comparison.prompts)
    names = [str(token) for token in range(longest)]
    axes = _Axes("Largest logit difference per token", "token", "max |difference|", log_y=True, x_names=names)
    for i, prompt in enumerate(comparison.prompts):
        axes.line(f"prompt {i}", list(enumerate(prompt.tokens["max_difference"].tolist())))
    return axes.svg()


def _scatter(comparison: Comparison) -> str:
    golden = torch.cat([prompt.golden.flatten() for prompt in comparison.prompts])
    ours = torch.cat([prompt.ours.flatten() for prompt in comparison.prompts])
    chosen = torch.randint(len(golden), (_SCATTER_POINTS,), generator=torch.Generator().manual_seed(0))
    axes = _Axes(f"Logits ({_SCATTER_POINTS} of {len(golden)})", "golden", "run")
    axes.dots(list(zip(golden[chosen].tolist(), ours[chosen].tolist(), strict=True)))
    return axes.svg()


def _error_growth(comparison: Comparison) -> str:
    names = _stage_names(comparison)
    axes = _Axes("Error growth over the layers", "layer", "worst relative error", log_y=True, x_names=names)
    axes.line("output of the layer", [(i, error) for i, (_, error) in enumerate(comparison.findings.growth)])
    return axes.svg()


def _router_flips(comparison: Comparison) -> str:
    counts = Counter(flip.stage for flip in comparison.findings.flips)
    axes = _Axes("Tokens with other experts", "layer", "tokens", x_names=_stage_names(comparison))
    axes.bars([(i, counts[stage]) for i, stage in enumerate(stages(comparison.golden.dimensions))])
    return axes.svg()


def _stage_names(comparison: Comparison) -> list[str]:
    return [stage.removeprefix("layers.").partition("_")[0] for stage in stages(comparison.golden.dimensions)]


class _Axes:
    """One figure. Points are collected first, since they decide the scales."""

    def __init__(
        self, title: str, x_label: str, y_label: str, log_y: bool = False, x_names: Sequence[str] | None = None
    ):
        """x_names: names of x = 0, 1, 2, ..., where these are things and not numbers."""
        self.title, self.x_label, self.y_label, self.log_y, self.x_names = title, x_label, y_label, log_y, x_names
        self.series: list[tuple[str, str, list[Point]]] = []

    def line(self, name: str, points: list[Point]) -> None:
        self.series.append(("line", name, points))

    def dots(self, points: list[Point]) -> None:
        self.series.append(("dots", "", points))

    def bars(self, points: list[Point]) -> None:
        self.series.append(("bars", "", points))

    def svg(self) -> str:
        self._scale()
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
            f'font-size="11" role="img" aria-label="{escape(self.title)}">',
            _label(_LEFT, 18, self.title, size=13),
            _label((_LEFT + _WIDTH) / 2, _HEIGHT - 8, self.x_label, "middle"),
            f'<g transform="rotate(-90 14 {_HEIGHT / 2})">{_label(14, _HEIGHT / 2, self.y_label, "middle")}</g>',
            *self._grid(),
        ]
        for number, (kind, name, points) in enumerate(self.series):
            colour = _COLOURS[number % len(_COLOURS)]
            parts += getattr(self, f"_draw_{kind}")([(self._x(x), self._y(y)) for x, y in points], colour)
            if name and number < len(_COLOURS):
                parts.append(_label(_WIDTH - _RIGHT, 18 + 12 * number, name, "end", colour))
        return "".join(parts) + "</svg>"

    def _scale(self) -> None:
        points = [point for _, _, points in self.series for point in points]
        self.x_range = _widen([x for x, _ in points])
        values = [y for _, y in points if math.isfinite(y)]
        if self.log_y:
            positive = [y for y in values if y > 0] or [1e-12, 1.0]
            self.floor = min(positive) / 2
            values = [math.log10(max(y, self.floor)) for y in values]
        elif any(kind == "bars" for kind, _, _ in self.series):
            values.append(0)
        self.y_range = _widen(values)

    def _x(self, x: float) -> float:
        low, high = self.x_range
        return _LEFT + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, y: float) -> float:
        low, high = self.y_range
        if self.log_y:
            y = math.log10(max(y, self.floor)) if math.isfinite(y) else high
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    def _grid(self) -> Iterator[str]:
        for i in range(5):
            y = self.y_range[0] + i / 4 * (self.y_range[1] - self.y_range[0])
            height = _HEIGHT - _BOTTOM - i / 4 * (_HEIGHT - _BOTTOM - _TOP)
            yield f'<path d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}" stroke="#e4e7eb"/>'
            yield _label(_LEFT - 6, height + 4, f"{10**y:.0e}" if self.log_y else f"{y:.3g}", "end")
        for x, name in self._x_ticks():
            yield _label(self._x(x), _HEIGHT - _BOTTOM + 15, name, "middle")

    def _x_ticks(self) -> list[tuple[float, str]]:
        if self.x_names is not None:
            step = -(-len(self.x_names) // 8)
            return list(enumerate(self.x_names))[::step]
        low, high = self.x_range
        return [(x, f"{x:.3g}") for x in (low + i / 4 * (high - low) for i in range(5))]

    def _draw_line(self, points: list[Point], colour: str) -> list[str]:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'] + [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in points
        ]

    def _draw_dots(self, points: list[Point], colour: str) -> list[str]:
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.5" fill="{colour}" fill-opacity=".5"/>' for x, y in points]

    def _draw_bars(self, points: list[Point], colour: str) -> list[str]:
        width, base = 0.6 * (_WIDTH - _LEFT - _RIGHT) / max(len(points), 1), self._y(0)
        return [
            f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{base - y:.1f}" fill="{colour}"/>'
            for x, y in points
        ]


def _widen(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _label(x: float, y: float, text: str, anchor: str = "start", colour: str = "#1f2933", size: int = 11) -> str:
    text = escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{text}</text>'
