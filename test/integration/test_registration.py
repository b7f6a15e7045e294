"""Registration in NxDI's own tables, ahead of NxDI's import and after it."""

import copy
import importlib
import os
import subprocess
import sys

import pytest
from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek.integrations import register, registration  # noqa: E402
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM  # noqa: E402
from nxdi_deepseek.without_sdk import nxdi_source  # noqa: E402
from nxdi_deepseek.without_sdk.environment import cpu_environment  # noqa: E402

OURS = {
    registration.INFERENCE_DEMO: {"deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe_lite", "sarvam_mla"}
    | {"axk1", "mistral4", "mistral3"},
    registration.CONSTANTS: {"deepseekv2", "deepseekv3", "kimik2", "kimik25", "glm4moelite", "sarvammla"}
    | {"axk1", "mistral4"},
}


@pytest.fixture(params=[registration.INFERENCE_DEMO, registration.CONSTANTS])
def table_module(request, monkeypatch):
    """A module of NxDI with its table as NxDI ships it."""
    module = importlib.import_module(request.param)
    shipped = {name: tasks for name, tasks in module.MODEL_TYPES.items() if name not in OURS[request.param]}
    monkeypatch.setattr(module, "MODEL_TYPES", copy.deepcopy(shipped))
    return module


def test_tables_gain_the_model_and_keep_the_rest(table_module):
    table = table_module.MODEL_TYPES
    shipped = copy.deepcopy(table)
    register()
    register()
    assert table_module.MODEL_TYPES is table
    added = {name: tasks for name, tasks in table.items() if name not in shipped}
    assert added.keys() == OURS[table_module.__name__]
    assert all(tasks == {"causal-lm": NeuronDeepseekV3ForCausalLM} for tasks in added.values())
    assert {name: table[name] for name in shipped} == shipped


@pytest.mark.parametrize("moved", [None, ["no longer a dict"]], ids=["gone", "of another type"])
def test_a_table_that_has_moved_is_a_warning_with_the_version(table_module, monkeypatch, moved):
    monkeypatch.setattr(table_module, "MODEL_TYPES", moved)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1")
    with pytest.warns(UserWarning, match="with neuronx_distributed_inference 99.1: .* has no MODEL_TYPES"):
        register()
    assert table_module.MODEL_TYPES is moved


def import_constants(tmp_path, prepare):
    """Registers, then imports NxDI's tables, in a process with a home that is no folder, after the code `prepare`."""
    code = f"{prepare}\nfrom nxdi_deepseek.integrations import register\nregister()\n"
    code += "import importlib.util\nassert importlib.util.find_spec('neuronx_distributed_inference.utils.constants')\n"
    code += "from neuronx_distributed_inference.utils.constants import MODEL_TYPES\n"
    code += "import sys\nprint('llama' in MODEL_TYPES, 'deepseekv3' in MODEL_TYPES)"
    (tmp_path / "home").touch()
    environment = cpu_environment() | {
        "HOME": str(tmp_path / "home"),
        "NXDI_SOURCE": os.environ.get("NXDI_SOURCE") or os.path.expanduser(nxdi_source.DEFAULT_SOURCE),
        "PYTHONWARNINGS": "default",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1], [
        line for line in result.stderr.splitlines() if "UserWarning: DeepSeek" in line
    ]


def test_registration_needs_no_cache_of_compiled_kernels(tmp_path):
    """numba writes one beside its source or at home, and fails where it can do neither."""
    assert import_constants(tmp_path, "import sys; sys.modules['numba'] = None") == ("True True", [])


@pytest.mark.parametrize("error", ["AttributeError('gone')", "SystemExit(1)"])
def test_nxdi_serves_its_other_models_when_ours_cannot_be_imported(tmp_path, error):
    """The first thing that importing our model does is to fail."""
    prepare = f"""
import builtins
import_module = builtins.__import__
def failing(name, globals=None, locals=None, fromlist=(), level=0):
    if level and "application" in name:
        raise {error}
    return import_module(name, globals, locals, fromlist, level)
builtins.__import__ = failing
"""
    tables, warnings = import_constants(tmp_path, prepare)
    assert tables == "True False"
    assert len(warnings) == 1 and error.partition("(")[0] in warnings[0]
