"""neuron_config.json is data: loading it imports nothing but NxDI's own packages. For both backends."""

import json
import sys

import pytest
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import DEMO_CONFIG
from nxdi_deepseek.modeling_deepseek import (
    DeepseekV3InferenceConfig,
    DeepseekV3NeuronConfig,
    load_pretrained_config,
)

CLASS = {"__module__": "planted.module", "__name__": "Class"}
MEMBER = {"_name_": "A", "_value_": 0, "__objclass__": CLASS}
DRAFT = {"draft_model_cls": CLASS, "worker_cls": CLASS, "draft_config": {}}
PLACES = {
    "an enum": {"neuron_config": {"blockwise_matmul_config": {"block_sharding_strategy": MEMBER}}},
    "an enum in a list": {"neuron_config": {"context_encoding_buckets": [{"of": MEMBER}]}},
    "the draft model": {"fused_spec_config": DRAFT},
    "the worker": {"fused_spec_config": {"worker_cls": CLASS}},
    "the draft's own config": {"fused_spec_config": {"draft_config": {"neuron_config": {"x": MEMBER}}}},
    "a field of the model": {"architectures": [CLASS]},
}


@pytest.fixture
def saved(tmp_path):
    """The path of a neuron_config.json as it is saved."""
    write_checkpoint(tmp_path, DEMO_CONFIG)
    config = DeepseekV3InferenceConfig(DeepseekV3NeuronConfig(), load_config=load_pretrained_config(tmp_path))
    config.save(tmp_path)
    return tmp_path / "neuron_config.json"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module on sys.path that leaves a mark when it is imported: the path of the mark."""
    package, mark = tmp_path / "path" / "planted", tmp_path / "mark"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "module.py").write_text(f"open({str(mark)!r}, 'w')\nclass Class: pass\n")
    monkeypatch.syspath_prepend(package.parent)
    yield mark
    sys.modules.pop("planted.module", None)


@pytest.mark.parametrize("place", PLACES)
def test_a_class_of_another_package_is_refused_before_it_is_imported(saved, planted, place):
    fields = json.loads(saved.read_text())
    for name, value in PLACES[place].items():
        fields[name] = fields.get(name) | value if isinstance(fields.get(name), dict) else value
    saved.write_text(json.dumps(fields))
    with pytest.raises(
        ConfigError, match=r"neuron_config.json names the class planted.module.Class.*; remove it"
    ) as error:
        DeepseekV3InferenceConfig.load(str(saved.parent))
    assert "\n" not in str(error.value)
    assert not planted.exists()


def test_a_config_made_from_a_dict_is_no_way_around_it(planted):
    with pytest.raises(ConfigError, match="names the class planted.module.Class"):
        DeepseekV3NeuronConfig(blockwise_matmul_config={"block_sharding_strategy": MEMBER})
    assert not planted.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("nxdi_deepseek.config", "DeepseekV3NeuronConfig"), ("nxdi_deepseek.errors", "gone"), ("nxdi_deepseek.gone", "A")],
    ids=["no enum", "no class", "no module"],
)
def test_a_member_of_no_enum_is_one_line(module, name):
    member = {"_name_": "A", "__objclass__": {"__module__": module, "__name__": name}}
    with pytest.raises(ConfigError, match="names no class that is installed"):
        DeepseekV3NeuronConfig(blockwise_matmul_config={"block_sharding_strategy": member})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"neuron_config": []}', '{"a":' * 5000], ids=lambda t: t[:20])
def test_what_is_no_saved_config_is_one_line(saved, text):
    saved.write_text(text)
    with pytest.raises(ConfigError, match="neuron_config.json: .*compile again") as error:
        DeepseekV3InferenceConfig.load(str(saved.parent))
    assert "\n" not in str(error.value)


def test_a_choice_that_the_expert_kernel_asserts_against_is_refused():
    """NKI's kernel sharded over the intermediate axis reads all weights."""
    choice = {"use_shard_on_intermediate_dynamic_while": True, "block_size": 256, "skip_dma_token": True}
    DeepseekV3NeuronConfig(seq_len=128, blockwise_matmul_config=choice)
    with pytest.raises(
        ConfigError, match="skip_dma_weight is not supported by the kernel of use_shard_on_intermediate"
    ):
        DeepseekV3NeuronConfig(seq_len=128, blockwise_matmul_config=choice | {"skip_dma_weight": True})
