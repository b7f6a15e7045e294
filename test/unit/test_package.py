"""How the package can be imported."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def test_contrib_style_import_from_the_repository_root():
    code = "from src.modeling_deepseek import NeuronDeepseekV3ForCausalLM as cls; print(cls.__module__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "src.application"


def test_only_the_seam_and_the_integrations_import_neuron_packages():
    allowed = {
        "nxdi_backend.py",
        "nxdi_experts.py",
        "nxdi_generation.py",
        "integrations",
        "rank_model.py",
        "device_graphs",
    }
    names = ("neuronx_distributed", "torch_neuronx", "torch_xla", "nki", "vllm")
    for path in (ROOT / "src").rglob("*.py"):
        if allowed & set(path.relative_to(ROOT / "src").parts):
            continue
        imports = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [module for module in imports if module.startswith(names)], path


@pytest.mark.skipif(importlib.util.find_spec("neuronx_distributed_inference") is not None, reason="NxDI is installed")
@pytest.mark.parametrize(("required", "status"), [("", 0), ("1", 2)])
def test_integration_tests_without_nxdi_pass_unless_it_is_required(tmp_path, required, status):
    environment = os.environ | {"NXDI_SOURCE": str(tmp_path), "REQUIRE_NXDI": required}
    command = [sys.executable, "-m", "pytest", "-q", "test/integration/test_registration.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stdout
    assert ("REQUIRE_NXDI=1, and no NxDI" in result.stdout) == bool(required)
