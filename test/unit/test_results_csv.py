"""The plugin in a pytest of its own: rows for what passed, failed and measured; nothing unless asked for."""

import csv
import math
import os
import pathlib
import subprocess
import sys

import nxdi_deepseek
import pytest

TESTS = """
import torch

def test_good(agree):
    golden = torch.tensor([[1.0, 2.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    agree(golden + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5]), golden, 0.2, logits=True)
    agree(golden, golden, 0.1)

def test_bad(agree):
    agree(torch.ones(3) * 2, torch.ones(3), 0.5)

def test_plain():
    pass
"""


def run_pytest(folder, *arguments, **environment):
    (folder / "test_it.py").write_text(TESTS)
    paths = [pathlib.Path(__file__).parents[1], pathlib.Path(nxdi_deepseek.__path__[0]).parent]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.results_csv", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def test_a_row_per_test_is_appended(tmp_path):
    path = tmp_path / "results.csv"
    run_pytest(tmp_path, "--results-csv", str(path))
    run_pytest(tmp_path, "-k", "plain", NXDI_DEEPSEEK_RESULTS_CSV=str(path))
    with path.open() as file:
        rows = {row["test"].partition("::")[2]: row for row in csv.DictReader(file)}
    assert len(path.read_text().splitlines()) == 1 + 3 + 1
    good, bad, plain = rows["test_good"], rows["test_bad"], rows["test_plain"]
    assert (good["outcome"], bad["outcome"], plain["outcome"]) == ("passed", "failed", "passed")
    assert float(good["max_abs"]) == 0.5  # the worse of the two
    assert float(good["max_rel"]) == 0.125
    kl = math.log((4 + math.e**1.5) / (4 + math.e)) - 0.5 * math.e / (4 + math.e)  # of the second row, by hand
    assert float(good["kl"]) == pytest.approx(kl, rel=1e-6)
    assert (good["shapes"], good["dtype"], float(good["threshold"])) == ("2x5", "float32", 0.2)
    assert "allowed 5.0e-01" in bad["error"]
    assert plain["max_abs"] == ""


def test_off_by_default(tmp_path):
    result = run_pytest(tmp_path, "-k", "plain")
    assert "1 passed" in result.stdout
    assert not list(tmp_path.glob("*.csv"))


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    result = run_pytest(tmp_path, "--results-csv", str(path))
    assert "has other columns; choose another file" in result.stderr + result.stdout
    assert path.read_text() == "a,b\n1,2\n"
