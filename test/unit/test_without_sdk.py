"""The command `without-sdk`, with two empty packages in the place of NxD and NxDI."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from nxdi_deepseek.cli import main
from nxdi_deepseek.without_sdk.environment import cpu_environment


@pytest.fixture
def source(tmp_path, monkeypatch):
    """NXDI_SOURCE, a folder with the two repositories."""
    for repository in ("neuronx-distributed", "neuronx-distributed-inference"):
        package = tmp_path / repository / "src" / repository.replace("-", "_")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("import torch_neuronx, nki\nfrom torch_xla.core import xla_model\n")
    monkeypatch.setenv("NXDI_SOURCE", str(tmp_path))
    return tmp_path


def run_command(*arguments, **options):
    command = [sys.executable, "-m", "nxdi_deepseek.cli", "without-sdk", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


IN_A_CHILD = """
import subprocess, sys
code = "import neuronx_distributed_inference as n, os; print(n.__file__, os.environ['NXD_CPU_MODE'], *sys.argv[1:])"
subprocess.run([sys.executable, "-c", "import sys; " + code, *sys.argv[1:]], check=True)
sys.exit(3)
"""


def test_all_processes_of_a_command_import_nxdi(source):
    """Its arguments, options among them, and its exit status are passed on."""
    result = run_command("python", "-c", IN_A_CHILD, "--help", "-x", "--", "y")
    file = source / "neuronx-distributed-inference" / "src" / "neuronx_distributed_inference" / "__init__.py"
    assert result.stdout.split() == [str(file), "1", "--help", "-x", "--", "y"], result.stderr
    assert result.returncode == 3


def test_a_process_that_does_not_ask_for_nxdi_pays_nothing(source):
    code = "import sys; print({'torch', 'transformers', 'torch_neuronx', 'nxdi_deepseek'} & set(sys.modules))"
    assert run_command(sys.executable, "-c", code).stdout.strip() == "set()"


def test_the_sitecustomize_of_the_environment_runs_too(source, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('theirs')")
    paths = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    result = run_command("python", "-c", "print('the command')", env=os.environ | {"PYTHONPATH": paths})
    # The first for the process of `without-sdk` itself.
    assert result.stdout.split("\n")[:-1] == ["theirs", "theirs", "the command"]


def test_a_missing_source_is_told_once_and_ahead_of_the_command(tmp_path):
    result = run_command("python", "-c", "print('ran')", env=os.environ | {"NXDI_SOURCE": str(tmp_path)})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("nxdi-deepseek without-sdk: no NxDI: neuronx_distributed is neither installed nor")
    assert result.stderr.count("\n") == 1


def test_a_source_that_goes_missing_is_told_to_each_who_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("NXDI_SOURCE", str(tmp_path))
    code = """
for _ in range(2):
    try:
        import neuronx_distributed
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], env=cpu_environment(), capture_output=True, text=True)
    assert [line[:8] for line in result.stdout.splitlines()] == ["no NxDI:"] * 2


def test_without_a_command_one_line_names_what_is_missing(capsys):
    assert main(["without-sdk"]) == 2
    error = capsys.readouterr().err
    assert "required: COMMAND (see nxdi-deepseek without-sdk --help)" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no-such-command", None, "no-such-command: no such command; install it beside .*, or give its path"),
        ("broken", "no program", "broken: cannot be run .Exec format error."),
        ("./gone", None, "./gone: no such command"),
    ],
)
def test_a_command_that_cannot_run_is_one_line(source, tmp_path, monkeypatch, capsys, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(b"\x7fELF" + text.encode())
        (tmp_path / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["without-sdk", name]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_commands_beside_this_python_come_first(source, tmp_path, monkeypatch):
    """An environment that is not active is used all the same."""
    decoy = tmp_path / Path(sys.executable).name
    decoy.write_text("#!/bin/sh\necho decoy\n")
    decoy.chmod(stat.S_IRWXU)
    result = run_command(decoy.name, "-c", "import sys; print(sys.prefix)", env=os.environ | {"PATH": str(tmp_path)})
    assert result.stdout.strip() == sys.prefix
