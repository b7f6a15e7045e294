"""The commands `demo` and `generate` on NxDI."""

import socket
import subprocess
import sys

from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek.checkpoint.synthetic import write_checkpoint  # noqa: E402
from nxdi_deepseek.cli import main  # noqa: E402
from nxdi_deepseek.example_configs import DEMO_CONFIG  # noqa: E402
from nxdi_deepseek.without_sdk.environment import cpu_environment  # noqa: E402


def test_demo_matches_hugging_face(capsys):
    nxdi.init_cpu_parallel()
    assert main(["demo", "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("backend: NxDI")
    assert "As soon as breakfast was over, Jane Fairfax was" in out
    assert "top-1 agreement with Hugging Face: 32 of 32" in out


def test_generate_prints_every_sequence(capsys, tmp_path):
    nxdi.init_cpu_parallel()
    write_checkpoint(tmp_path, DEMO_CONFIG)
    prompts = ["--prompt-ids", "5,17,42", "--prompt-ids", "7,8"]
    assert main(["generate", str(tmp_path), *prompts, "--max-new-tokens", "6", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split()) for line in lines if line.startswith("[")] == [7, 7]


def test_two_runs_at_once(tmp_path):
    """Without torchrun, neither takes a port of the machine; in turn they would print the same."""
    write_checkpoint(tmp_path, DEMO_CONFIG)
    command = [sys.executable, "-m", "nxdi_deepseek.cli", "generate", str(tmp_path), "--prompt-ids", "5,17,42"]
    command += ["--max-new-tokens", "6", "--dtype", "float32"]
    # A port that nobody can bind stands for one that another run has taken.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        environment = cpu_environment() | {"MASTER_PORT": str(taken.getsockname()[1])}
        runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [run.communicate(timeout=300)[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert len(outputs[0][-1].split()) == 6


def test_a_number_of_processes_that_is_none(tmp_path):
    """NxD reads it while it is imported."""
    write_checkpoint(tmp_path, DEMO_CONFIG)
    command = [sys.executable, "-m", "nxdi_deepseek.cli", "generate", str(tmp_path), "--prompt-ids", "5"]
    environment = cpu_environment() | {"WORLD_SIZE": "two"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "WORLD_SIZE is not torchrun's" in run.stderr
