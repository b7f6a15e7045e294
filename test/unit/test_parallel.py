"""Worker threads: what is under way is bounded, the first error and the keyboard stop all."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from nxdi_deepseek.checkpoint.parallel import run_threads, thread_count
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import ConfigError
from support.encodings import write_encoded


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_item_comes_back_once(jobs):
    assert sorted(run_threads(range(100), lambda i: i * i, jobs)) == [i * i for i in range(100)]


def test_items_are_taken_as_they_are_needed():
    """There may be 20,000 units, and a generator of them may end by the clock."""
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    results = run_threads(items(), lambda i: i, jobs=2)
    next(results)
    assert len(taken) <= 8
    results.close()
    assert len(taken) <= 8


def test_the_first_error_ends_all():
    begun = []

    def work(i):
        begun.append(i)
        if i == 5:
            raise ValueError("five")
        return i

    before = threading.active_count()
    with pytest.raises(ValueError, match="five"):
        list(run_threads(range(1000), work, jobs=2))
    assert len(begun) < 30
    assert threading.active_count() == before


def test_an_error_of_the_caller_ends_all():
    begun = []
    results = run_threads(range(1000), lambda i: begun.append(i) or i, jobs=2)
    next(results)
    results.close()
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count <= 8


def test_jobs_default_to_the_cores():
    assert thread_count(None) == len(os.sched_getaffinity(0))
    assert thread_count(3) == 3
    for jobs in (0, -1):
        with pytest.raises(ConfigError, match=f"jobs {jobs} must be from 1 to 1024"):
            thread_count(jobs)


@pytest.mark.parametrize("jobs", ["0", "-1"])
@pytest.mark.parametrize("command", ["shard", "dry run", "verify", "unshard"])
def test_jobs_that_cannot_be_are_one_line(tmp_path, capsys, command, jobs):
    write_encoded(tmp_path / "model", "BF16")
    arguments = {
        "shard": ["shard", "model", "out", "--tp-degree", "4"],
        "dry run": ["shard", "model", "out", "--tp-degree", "4", "--dry-run"],
        "verify": ["verify", "model", "out"],
        "unshard": ["unshard", "out", "back"],
    }[command]
    paths = {name: str(tmp_path / name) for name in ("model", "out", "back")}
    assert main([*(paths.get(word, word) for word in arguments), "--jobs", jobs]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"jobs {jobs} must be from 1 to 1024" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


SLOW_SHARD = r"""
import os, sys, time
from nxdi_deepseek import cli
from nxdi_deepseek.checkpoint import decoder
original = decoder.UnitDecoder.regions
def regions(self, unit):
    os.write(1, b"begun\n")  # one call: two workers begin at once
    time.sleep(1)
    yield from original(self, unit)
decoder.UnitDecoder.regions = regions
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_keyboard_ends_a_run_that_can_be_resumed(tmp_path):
    write_encoded(tmp_path / "model", "BF16")
    arguments = ["shard", str(tmp_path / "model"), str(tmp_path / "out"), "--tp-degree", "4"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SHARD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert main([*arguments, "--resume"]) == 0
