"""Registration in NxDI's own tables. That it precedes NxDI's import is what test_inference_demo.py runs on."""

import copy
import importlib

import pytest
from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek.integrations import register, registration  # noqa: E402
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM  # noqa: E402


@pytest.fixture(params=[registration.INFERENCE_DEMO, registration.CONSTANTS])
def table_module(request, monkeypatch):
    """A module of NxDI with its table as NxDI ships it."""
    module = importlib.import_module(request.param)
    keys = registration.MODEL_TYPES + registration.ARCHITECTURE_KEYS
    shipped = {name: tasks for name, tasks in module.MODEL_TYPES.items() if name not in keys}
    monkeypatch.setattr(module, "MODEL_TYPES", copy.deepcopy(shipped))
    return module


def test_tables_gain_the_model_and_keep_the_rest(table_module):
    table = table_module.MODEL_TYPES
    shipped = copy.deepcopy(table)
    register()
    register()
    assert table_module.MODEL_TYPES is table
    added = {name: tasks for name, tasks in table.items() if name not in shipped}
    inference_demo = table_module.__name__.endswith("inference_demo")
    assert added.keys() == ({"deepseek_v3", "kimi_k2"} if inference_demo else {"deepseekv3", "kimik2"})
    assert all(tasks == {"causal-lm": NeuronDeepseekV3ForCausalLM} for tasks in added.values())
    assert {name: table[name] for name in shipped} == shipped


@pytest.mark.parametrize("moved", [None, ["no longer a dict"]], ids=["gone", "of another type"])
def test_a_table_that_has_moved_is_a_warning_with_the_version(table_module, monkeypatch, moved):
    monkeypatch.setattr(table_module, "MODEL_TYPES", moved)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1")
    with pytest.warns(UserWarning, match="not registered in .* of neuronx_distributed_inference 99.1: it has no MODEL"):
        register()
    assert table_module.MODEL_TYPES is moved
