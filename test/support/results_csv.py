"""Pytest plugin: what tests measured, as CSV. Off but for `--results-csv PATH` or NXDI_DEEPSEEK_RESULTS_CSV=PATH.

Appends one row per test: its metrics (the worst, where a test measures several times), shapes, dtype, outcome, duration
and the commit. Tests measure through the fixture `agree`, which also asserts.
"""

import csv
import io
import os
import pathlib
import subprocess

import pytest

VARIABLE = "NXDI_DEEPSEEK_RESULTS_CSV"
METRICS = {"pcc": min, "max_abs": max, "max_rel": max, "kl": max}  # and which of several is the worst
COLUMNS = ("test", "outcome", "duration_s", *METRICS, "threshold", "shapes", "dtype", "error", "commit")
_MEASURED = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--results-csv", metavar="PATH", help="append a row per test with what it measured")


def pytest_configure(config):
    path = config.getoption("--results-csv") or os.environ.get(VARIABLE)
    if path:
        config.pluginmanager.register(_Writer(pathlib.Path(path)))


@pytest.fixture
def agree(request):
    """agree(actual, expected, threshold, logits=False): asserts max |actual - expected| <= threshold * max |expected|.

    Measures Pearson correlation, largest absolute difference, the same relative to the largest expected magnitude and,
    for logits, the largest KL(expected || actual) of a row.
    """
    measured = request.node.stash.setdefault(_MEASURED, [])

    def check(actual, expected, threshold, logits=False):
        import torch
        from nxdi_deepseek.accuracy.metrics import pearson, token_metrics

        assert actual.shape == expected.shape
        difference = (actual.double() - expected.double()).abs().max().item()
        relative = difference / expected.abs().max().item()
        row = {"pcc": pearson(expected, actual), "max_abs": difference, "max_rel": relative}
        if logits:
            row["kl"] = token_metrics(expected.flatten(0, -2), actual.flatten(0, -2))["kl"].max().item()
        shape, dtype = "x".join(map(str, actual.shape)), str(actual.dtype).removeprefix("torch.")
        measured.append(row | {"threshold": threshold, "shapes": shape, "dtype": dtype})
        assert torch.isfinite(actual).all()
        assert relative <= threshold, f"largest difference {relative:.1e} of the largest value, allowed {threshold:.1e}"

    return check


class _Writer:
    def __init__(self, path):
        self.path = path
        if path.exists() and path.read_text().partition("\n")[0] != ",".join(COLUMNS):
            raise pytest.UsageError(f"--results-csv {path}: has other columns; choose another file")
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
        self.commit = git.stdout.strip()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or report.outcome != "passed":
            self._append(_row(item, report) | {"commit": self.commit})
        return report

    def _append(self, row):
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not self.path.exists():
            writer.writeheader()
        writer.writerow(row)
        with self.path.open("a") as file:
            file.write(text.getvalue())


def _row(item, report):
    measured = item.stash.get(_MEASURED, [])
    error = report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else ""
    row = {"test": item.nodeid, "outcome": report.outcome, "duration_s": f"{report.duration:.3f}"}
    for name, worst in METRICS.items():
        values = [one[name] for one in measured if name in one]
        row[name] = f"{worst(values):.9g}" if values else ""
    row["threshold"] = max((one["threshold"] for one in measured), default="")
    for name in ("shapes", "dtype"):
        row[name] = " ".join(dict.fromkeys(one[name] for one in measured))
    return row | {"error": error.partition("\n")[0]}
