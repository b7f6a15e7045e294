"""What the commands on checkpoints load: no backend, no transformers, and numba only where weights are decoded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nxdi_deepseek
import pytest
from support.encodings import write_encoded

HEAVY = ("transformers", "numba", "llvmlite", "neuronx_distributed", "torch_xla", "nxdi_deepseek.embedded")
HEAVY += ("nxdi_deepseek.backend", "nxdi_deepseek.nxdi_backend", "nxdi_deepseek.application")


def run(code, *arguments, **environment):
    """What a new process prints. NxDI is asked for, and is not there."""
    environment = os.environ | {"NXDI_DEEPSEEK_BACKEND": "nxdi"} | environment
    result = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def loaded(code, *arguments):
    return set(run(f"{code}\nimport sys\nprint('modules', *sys.modules)", *arguments).splitlines()[-1].split())


def command(*arguments):
    """The modules that a command of the package leaves in its process."""
    return loaded(
        "import sys\nfrom nxdi_deepseek.cli import main\nassert main(sys.argv[1:]) == 0", *map(str, arguments)
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp("model"), "FP8, float32 scales")


def heavy(modules):
    return sorted(name for name in modules if name.startswith(HEAVY))


def test_the_commands_run_on_a_machine_without_nxdi(model_dir, tmp_path):
    """One after the other, each in a process of its own."""
    numba = {"numba", "llvmlite"}
    assert heavy(command("inspect", model_dir)) == []
    for decoding, arguments in (
        (True, ["shard", model_dir, tmp_path / "out", "--tp-degree", "2"]),
        (True, ["verify", model_dir, tmp_path / "out"]),
        (False, ["unshard", tmp_path / "out", tmp_path / "back"]),
    ):
        found = {name.partition(".")[0] for name in heavy(command(*arguments))}
        assert found == (numba if decoding else set()), arguments


def test_inspect_adds_nothing_of_torch_distributed(model_dir):
    added = command("inspect", model_dir) - loaded("import torch")
    assert not [name for name in added if name.startswith("torch.distributed")]


def test_importing_what_decodes_loads_no_numba():
    assert heavy(loaded("import nxdi_deepseek.checkpoint.sharder, nxdi_deepseek.checkpoint.convert")) == []


def test_kernels_work_where_numba_has_no_place_to_keep_them(model_dir, tmp_path):
    """A read-only package and a HOME that is none: numba finds no place for its cache and raises."""
    package = Path(nxdi_deepseek.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(package, tmp_path / "site/nxdi_deepseek", ignore=ignore)
    # A file where the folder should be: the superuser, too, cannot write there.
    (tmp_path / "site/nxdi_deepseek/checkpoint/__pycache__").write_text("")
    code = (
        "import os, sys\n"
        "os.environ.pop('NUMBA_CACHE_DIR', None), os.environ.pop('XDG_CACHE_HOME', None)\n"
        "from nxdi_deepseek.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "from nxdi_deepseek.checkpoint import kernels\n"
        "print(kernels.__file__)\n"
    )
    arguments = ("shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "2")
    printed = run(code, *arguments, PYTHONPATH=str(tmp_path / "site"), HOME="/dev/null/nonexistent")
    assert str(tmp_path / "site") in printed
    assert len(list(tmp_path.glob("out/weights/*.safetensors"))) == 2
    assert not list((tmp_path / "site").rglob("*.nbi"))
