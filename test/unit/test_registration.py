"""Registration where NxDI, vLLM or the Neuron plugin are absent, changed, or imported in any order."""

import importlib
import importlib.metadata
import subprocess
import sys
import types
import warnings

import pytest
from nxdi_deepseek.integrations import register, registration, vllm
from nxdi_deepseek.integrations.post_import import when_imported


@pytest.fixture
def module_dir(tmp_path, monkeypatch):
    """A folder on sys.path, for packages that the test makes up; they are forgotten at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    made_up = {folder.name for folder in tmp_path.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in made_up]:
        del sys.modules[name]


def write_package(folder, name, **modules):
    """Writes package `name` with a submodule for each keyword, whose value is its source."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    for module, source in modules.items():
        (folder / name / f"{module}.py").write_text(source)


@pytest.fixture
def plugin_dir(module_dir, monkeypatch):
    """As module_dir, with a vLLM that records the architectures registered with it."""
    known = {"DeepseekV3ForCausalLM": "its own"}
    registry = types.SimpleNamespace(get_supported_archs=lambda: known.keys(), register_model=known.__setitem__)
    fake = types.ModuleType("vllm")
    fake.ModelRegistry, fake.known = registry, known
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return module_dir


def test_callback_waits_for_the_import(module_dir):
    write_package(module_dir, "waited_for", part="value = 1")
    seen = []
    when_imported("waited_for.part", lambda module: seen.append(module.value))
    importlib.import_module("waited_for")
    assert seen == []
    importlib.import_module("waited_for.part")
    assert seen == [1]
    when_imported("waited_for.part", lambda module: seen.append(2))
    assert seen == [1, 2]


def test_callbacks_of_one_module_all_run_and_it_runs_once(module_dir):
    write_package(module_dir, "waited_for", part="import builtins\nruns = getattr(builtins, 'runs', 0) + 1")
    seen = []
    for i in range(3):
        when_imported("waited_for.part", lambda module, i=i: seen.append((i, module.runs)))
    importlib.import_module("waited_for.part")
    assert sorted(seen) == [(0, 1), (1, 1), (2, 1)]


def test_a_module_that_is_missing_stays_missing(module_dir):
    when_imported("no_such_module", lambda module: pytest.fail("there is nothing to call for"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.platform_plugins"])
def test_entry_points_of_the_installed_package_import_nothing_heavy(group):
    """vLLM loads them in every process, whatever it serves."""
    code = (
        "import importlib.metadata as m, sys\n"
        f"entries = [e for e in m.entry_points(group={group!r}) if e.value.startswith('nxdi_deepseek')]\n"
        "print([entry.load()() for entry in entries])\n"
        "print(sorted({'torch', 'transformers', 'neuronx_distributed', 'vllm'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["[None]", "[]"], result.stderr


def test_register_imports_nothing_of_nxdi(module_dir):
    register()
    register()
    assert not any(name.startswith("neuronx_distributed") for name in sys.modules)


def test_without_the_plugin_nothing_happens(module_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would fail
    with warnings.catch_warnings(action="error"):
        vllm.register_model()


@pytest.mark.parametrize("modules", [{}, {"worker": ""}], ids=["no worker package", "no loader in it"])
def test_a_plugin_whose_loader_has_moved(plugin_dir, modules):
    write_package(plugin_dir, "vllm_neuron", **modules)
    (plugin_dir / "vllm_neuron-9.9.dist-info").mkdir()
    (plugin_dir / "vllm_neuron-9.9.dist-info" / "METADATA").write_text("Name: vllm_neuron\nVersion: 9.9\n")
    with pytest.warns(UserWarning, match="not registered: vllm_neuron 9.9 has no vllm_neuron.worker.neuronx_dist"):
        vllm.register_model()


def test_a_loader_whose_table_has_moved(plugin_dir):
    write_package(plugin_dir, "vllm_neuron")
    write_package(plugin_dir / "vllm_neuron", "worker", neuronx_distributed_model_loader="TABLES = {}")
    vllm.register_model()
    with pytest.warns(UserWarning, match=r"of vllm_neuron \(from source\): it has no MODEL_TYPES table any more"):
        loader = importlib.import_module("vllm_neuron.worker.neuronx_distributed_model_loader")
    assert loader.TABLES == {}


def test_only_architectures_that_vllm_does_not_know_are_registered_with_it(plugin_dir):
    write_package(plugin_dir, "vllm_neuron")
    write_package(plugin_dir / "vllm_neuron", "worker", neuronx_distributed_model_loader="")
    vllm.register_model()
    vllm.register_model()
    known = sys.modules["vllm"].known
    assert known.keys() == {"DeepseekV3ForCausalLM", "KimiK2ForCausalLM"}
    assert known["DeepseekV3ForCausalLM"] == "its own"


def test_another_backend_is_not_registered(module_dir):
    """This process runs the embedded backend, whose class NxDI cannot use."""
    table = types.ModuleType("neuronx_distributed_inference.utils.constants")
    table.MODEL_TYPES = {"llama": {}}
    with pytest.warns(UserWarning, match="NXDI_DEEPSEEK_BACKEND=embedded; unset it"):
        registration.add_model(table, registration.ARCHITECTURE_KEYS)
    assert table.MODEL_TYPES == {"llama": {}}


def test_cpu_platform_only_where_asked_for_and_without_devices(plugin_dir, monkeypatch):
    write_package(plugin_dir, "vllm_neuron")
    devices = []
    monkeypatch.setattr(vllm.glob, "glob", lambda pattern: devices)
    monkeypatch.delenv(vllm.CPU_VARIABLE, raising=False)
    assert vllm.cpu_platform() is None
    monkeypatch.setenv(vllm.CPU_VARIABLE, "1")
    assert vllm.cpu_platform() == "vllm_neuron.platform.NeuronPlatform"
    devices.append("/dev/neuron0")
    assert vllm.cpu_platform() is None


def test_cpu_platform_without_the_plugin(module_dir, monkeypatch):
    monkeypatch.setenv(vllm.CPU_VARIABLE, "1")
    with pytest.warns(UserWarning, match="vllm_neuron is not installed"):
        assert vllm.cpu_platform() is None
