"""How the package can be imported."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_contrib_style_import_from_the_repository_root():
    code = "from src.modeling_deepseek import NeuronDeepseekV3ForCausalLM as cls; print(cls.__module__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "src.application"


def test_only_the_seam_and_the_integrations_import_neuron_packages():
    allowed = {"nxdi_backend.py", "integrations", "rank_model.py"}
    names = ("neuronx_distributed", "torch_neuronx", "torch_xla", "nki", "vllm")
    for path in (ROOT / "src").rglob("*.py"):
        if allowed & set(path.relative_to(ROOT / "src").parts):
            continue
        imports = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [module for module in imports if module.startswith(names)], path
