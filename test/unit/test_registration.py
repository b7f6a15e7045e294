"""Registration where NxDI, vLLM or the Neuron plugin are absent, changed, broken, or imported in any order."""

import importlib
import importlib.metadata
import pickle
import re
import subprocess
import sys
import types
import warnings

import pytest
from nxdi_deepseek.family import ARCHITECTURES, FAMILY
from nxdi_deepseek.integrations import post_import, register, registration, vllm
from nxdi_deepseek.integrations.post_import import when_imported
from nxdi_deepseek.integrations.transformers_configs import register_configs
from nxdi_deepseek.integrations.vllm_config import ServingChecks
from transformers import AutoConfig

LOADER = "vllm_neuron.worker.neuronx_distributed_model_loader"


@pytest.fixture
def module_dir(tmp_path, monkeypatch):
    """A folder on sys.path, for packages that the test makes up; they are forgotten at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(post_import._finder, "callbacks", {})
    yield tmp_path
    made_up = {folder.name for folder in tmp_path.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in made_up]:
        del sys.modules[name]


def write_package(folder, name, **modules):
    """Writes package `name` with a submodule for each keyword, whose value is its source."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "__init__.py").touch()
    for module, source in modules.items():
        (folder / name / f"{module}.py").write_text(source)


def write_plugin(folder, loader="MODEL_TYPES = {'llama': {}}"):
    """A Neuron plugin whose loader is NxDI's."""
    write_package(folder, "vllm_neuron", platform="")
    write_package(folder / "vllm_neuron", "worker", neuronx_distributed_model_loader=loader)


@pytest.fixture
def plugin_dir(module_dir, monkeypatch):
    """As module_dir, with a vLLM that records the architectures registered with it, and has checks of its own."""
    known = {"DeepseekV3ForCausalLM": "its own"}
    registry = types.SimpleNamespace(get_supported_archs=lambda: known.keys(), register_model=known.__setitem__)
    fake = types.ModuleType("vllm")
    fake.ModelRegistry, fake.known = registry, known
    checks = types.ModuleType("vllm.model_executor.models.config")
    checks.MODELS_CONFIG_MAP = {}
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = object()
    for module in (fake, checks, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return module_dir


def checks_of_vllm():
    return sys.modules["vllm.model_executor.models.config"].MODELS_CONFIG_MAP


# The import hook


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


def test_a_callback_given_twice_runs_once(module_dir):
    write_package(module_dir, "waited_for", part="value = 1")
    seen = []
    for _ in range(2):
        when_imported("waited_for.part", seen.append)
    module = importlib.import_module("waited_for.part")
    assert seen == [module]


def test_a_module_that_is_missing_stays_missing(module_dir):
    when_imported("no_such_module", lambda module: pytest.fail("there is nothing to call for"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")
    assert importlib.util.find_spec("no_such_module") is None


def test_a_module_only_looked_for_is_still_waited_for(module_dir):
    """Who asks whether NxDI is there, as transformers and vLLM do, must not use up the hook."""
    write_package(module_dir, "waited_for", part="value = 1")
    seen = []
    when_imported("waited_for.part", lambda module: seen.append(module.value))
    spec = importlib.util.find_spec("waited_for.part")
    assert spec.loader.get_source("waited_for.part") == "value = 1"
    assert spec.loader.path == spec.origin == str(module_dir / "waited_for" / "part.py")
    assert seen == []
    importlib.import_module("waited_for.part")
    assert seen == [1]


def test_a_first_import_that_fails_is_followed_by_another(module_dir):
    write_package(module_dir, "waited_for", part="raise OSError('not yet')")
    seen = []
    when_imported("waited_for.part", lambda module: seen.append(module.value))
    with pytest.raises(OSError, match="not yet"):
        importlib.import_module("waited_for.part")
    assert seen == []
    write_package(module_dir, "waited_for", part="value = 'now it works'")
    importlib.import_module("waited_for.part")
    assert seen == ["now it works"]


def test_a_reload_is_seen(module_dir):
    write_package(module_dir, "waited_for", part="value = 1")
    seen = []
    when_imported("waited_for.part", lambda module: seen.append(module))
    module = importlib.import_module("waited_for.part")
    assert importlib.reload(module) is module
    assert seen == [module, module]


def test_a_module_keeps_the_loader_of_its_file(module_dir):
    """inspect, pkgutil and importlib.resources ask it for source and data."""
    write_package(module_dir, "waited_for", part="value = 1")
    when_imported("waited_for", lambda module: None)
    when_imported("waited_for.part", lambda module: None)
    package, module = map(importlib.import_module, ("waited_for", "waited_for.part"))
    for found in (package, module):
        assert type(found.__loader__) is type(found.__spec__.loader) is importlib.machinery.SourceFileLoader
        assert "exec_module" not in vars(found.__loader__)
    assert importlib.resources.files("waited_for").joinpath("part.py").read_text() == "value = 1"


# Our own tables


def test_register_imports_nothing_of_nxdi(module_dir):
    register()
    register()
    assert not any(name.startswith("neuronx_distributed") for name in sys.modules)


def test_another_backend_is_not_registered(module_dir):
    """This process runs the embedded backend, whose class NxDI cannot use."""
    table = types.ModuleType("neuronx_distributed_inference.utils.constants")
    table.MODEL_TYPES = {"llama": {}}
    with pytest.warns(UserWarning, match="NXDI_DEEPSEEK_BACKEND=embedded; unset it"):
        registration.add_by_architecture(table)
    assert table.MODEL_TYPES == {"llama": {}}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AttributeError("module has no attribute 'x'"), "AttributeError: module has no attribute 'x'"),
        (RuntimeError("no such\nthing"), "RuntimeError: no such thing"),
        (OSError(30, "Read-only file system"), r"OSError: \[Errno 30\] Read-only file system"),
        (SystemExit(3), "SystemExit: 3"),
        (MemoryError(), "MemoryError: "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_goes_wrong_is_one_warning(module_dir, monkeypatch, error, message):
    """NxDI's module, which is being imported for some other model, is imported."""

    def fail():
        raise error

    monkeypatch.setattr(registration, "_causal_lm", fail)
    write_package(module_dir, "neuronx_distributed_inference", inference_demo="MODEL_TYPES = {'llama': {}}")
    write_package(module_dir / "neuronx_distributed_inference", "utils", constants="MODEL_TYPES = {'llama': {}}")
    register()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        modules = [importlib.import_module(name) for name in (registration.INFERENCE_DEMO, registration.CONSTANTS)]
    (text,) = (str(warning.message) for warning in caught)
    assert re.fullmatch(rf"DeepSeek-V3 is not registered with neuronx_distributed_inference \(.*\): {message}", text)
    assert all(module.MODEL_TYPES == {"llama": {}} for module in modules)


def test_an_interrupt_is_none_of_our_errors(module_dir, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(registration, "_causal_lm", interrupt)
    table = types.ModuleType("table")
    table.MODEL_TYPES = {}
    with pytest.raises(KeyboardInterrupt):
        registration.add_by_architecture(table)


def test_configs_of_the_family_reach_a_process_of_their_own():
    """vLLM pickles the config for the processes that it spawns."""
    register_configs()
    configs = [AutoConfig.for_model(name, hidden_size=1920) for name in FAMILY]
    assert [config.model_type for config in configs] == list(FAMILY)
    code = "import pickle, sys; print([(c.model_type, c.hidden_size) for c in pickle.load(sys.stdin.buffer)])"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(configs), capture_output=True)
    assert result.stdout.decode().strip() == str([(name, 1920) for name in FAMILY]), result.stderr.decode()


# vLLM


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


def test_without_the_plugin_nothing_happens(module_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would fail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vllm.register_model()


@pytest.mark.parametrize("modules", [{}, {"worker": ""}], ids=["no worker package", "no loader in it"])
def test_a_plugin_that_runs_models_in_another_way(plugin_dir, modules):
    """It may have a DeepSeek of its own, to which our refusals do not apply."""
    write_package(plugin_dir, "vllm_neuron", **modules)
    (plugin_dir / "vllm_neuron-9.9.dist-info").mkdir()
    (plugin_dir / "vllm_neuron-9.9.dist-info" / "METADATA").write_text("Name: vllm_neuron\nVersion: 9.9\n")
    with pytest.warns(UserWarning, match="not registered with vllm_neuron 9.9: it has no vllm_neuron.worker.neuronx"):
        vllm.register_model()
    assert checks_of_vllm() == {}
    assert sys.modules["vllm"].known == {"DeepseekV3ForCausalLM": "its own"}


def test_a_loader_whose_table_has_moved(plugin_dir):
    write_plugin(plugin_dir, loader="TABLES = {}")
    vllm.register_model()
    with pytest.warns(UserWarning, match=r"with vllm_neuron \(from source\): vllm_neuron.* has no MODEL_TYPES table"):
        loader = importlib.import_module(LOADER)
    assert loader.TABLES == {}


@pytest.mark.parametrize("error", ["AttributeError('moved')", "SystemExit(1)"])
def test_a_plugin_or_vllm_that_breaks_is_one_warning(plugin_dir, monkeypatch, error):
    write_plugin(plugin_dir)
    (plugin_dir / "vllm_neuron" / "__init__.py").write_text(f"raise {error}")
    monkeypatch.setenv(vllm.CPU_VARIABLE, "1")
    for entry_point in (vllm.register_model, vllm.cpu_platform):
        with pytest.warns(UserWarning, match="not registered with vllm_neuron") as caught:
            assert entry_point() is None
        assert len(caught) == 1


def test_only_architectures_that_vllm_does_not_know_are_registered_with_it(plugin_dir):
    write_plugin(plugin_dir)
    vllm.register_model()
    vllm.register_model()
    known = sys.modules["vllm"].known
    assert known.keys() == set(ARCHITECTURES)
    assert known["DeepseekV3ForCausalLM"] == "its own"


def test_our_checks_come_after_those_that_vllm_has(plugin_dir):
    """Whichever methods its entry has: vLLM 0.11 calls one, 0.16 another too."""
    seen = []

    class TheirConfig:
        @staticmethod
        def verify_and_update_config(config):
            seen.append(config)

    checks_of_vllm().update(DeepseekV3ForCausalLM=TheirConfig, LlamaForCausalLM=TheirConfig)
    write_plugin(plugin_dir)
    vllm.register_model()
    vllm.register_model()
    assert checks_of_vllm()["LlamaForCausalLM"] is TheirConfig
    assert checks_of_vllm()["DeepseekV3ForCausalLM"] == ServingChecks(TheirConfig)
    for architecture in ARCHITECTURES:
        checks_of_vllm()[architecture].verify_and_update_model_config("model config")
        checks_of_vllm()[architecture].verify_and_update_config("whole config")
    assert seen == ["whole config"]
    TheirConfig.verify_and_update_model_config = staticmethod(seen.append)
    checks_of_vllm()["DeepseekV3ForCausalLM"].verify_and_update_model_config("model config")
    assert seen == ["whole config", "model config"]


def test_cpu_platform_only_where_asked_for_and_without_devices(plugin_dir, monkeypatch):
    write_plugin(plugin_dir)
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
    with pytest.warns(UserWarning, match="vllm_neuron.platform is not installed"):
        assert vllm.cpu_platform() is None
