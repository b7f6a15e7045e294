"""The MTP layer as the draft of NxDI's own fused model, in CPU mode: against a reference of its own."""

import pytest
from support import nxdi

nxdi.require_nxdi()

from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig  # noqa: E402
from nxdi_deepseek.errors import ConfigError  # noqa: E402
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM, NeuronDeepseekV3Model  # noqa: E402
from nxdi_deepseek.speculation import draft_config  # noqa: E402
from support.fused_cpu import FusedModule  # noqa: E402
from support.models import load_config, random_prompts  # noqa: E402
from support.mtp_drafts import ACCEPTANCE, FAULTS, PROMPT_LENGTHS, write_drafted  # noqa: E402
from support.mtp_reference import ReferenceMTP  # noqa: E402
from support.mtp_suite import acceptance, assert_right  # noqa: E402

PROMPTS = random_prompts(PROMPT_LENGTHS)
STEPS, LENGTHS = 8, (2, 3)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    """Folders by how often their drafts are accepted."""
    return {kind: write_drafted(tmp_path_factory.mktemp(kind), kind) for kind in ACCEPTANCE}


@pytest.fixture(scope="module")
def references(drafted):
    return {kind: ReferenceMTP(folder) for kind, folder in drafted.items()}


@pytest.fixture(scope="module")
def on_four_ranks(drafted):
    """What every kind and length gives on each rank: a group of processes takes long to start."""
    return nxdi.run_parallel(run_all, 4, drafted, 4)


def run(folder, length, tp_degree=1, fault=None):
    """Tokens and drafts on this rank, of uneven rows."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        neuron = {"batch_size": len(PROMPTS), "seq_len": 64, "max_context_length": 24, "tp_degree": tp_degree}
        fused = FusedModule(folder, monkeypatch, length, **neuron)
        if fault:
            fault(monkeypatch, fused.module.target_model)
        return fused.run(PROMPTS, STEPS)


def run_all(folders, tp_degree):
    return {(kind, length): run(folder, length, tp_degree) for kind, folder in folders.items() for length in LENGTHS}


def assert_as_asked(references, kind, length, rows, drafts):
    assert_right(references[kind], PROMPTS, rows, drafts)
    least, most = ACCEPTANCE[kind]
    assert least <= acceptance(PROMPTS, rows, STEPS, length) <= most


@pytest.mark.parametrize("kind", ACCEPTANCE)
@pytest.mark.parametrize("length", LENGTHS)
def test_drafts_equal_the_reference_and_tokens_hugging_face(drafted, references, kind, length):
    assert_as_asked(references, kind, length, *run(drafted[kind], length))


@pytest.mark.parametrize("kind", ACCEPTANCE)
@pytest.mark.parametrize("length", LENGTHS)
def test_so_they_do_on_four_ranks(references, on_four_ranks, kind, length):
    for rank in on_four_ranks:
        assert_as_asked(references, kind, length, *rank[kind, length])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(drafted, references, fault):
    rows, drafts = run(drafted["half"], 2, fault=fault)
    with pytest.raises(AssertionError):
        assert_right(references["half"], PROMPTS, rows, drafts)


def test_fields_are_filled_in_and_survive_their_json(drafted, tmp_path):
    config = NeuronDeepseekV3ForCausalLM(str(drafted["half"]), speculating(drafted["half"])).config
    config.save(tmp_path)
    loaded = NeuronDeepseekV3ForCausalLM(str(tmp_path)).config
    for each in (config, loaded):
        neuron_config, draft = each.neuron_config, each.fused_spec_config.draft_config
        assert (neuron_config.speculation_length, neuron_config.enable_fused_speculation) == (2, True)
        assert neuron_config.on_device_sampling_config is not None
        assert not neuron_config.kv_cache_tiling
        assert not neuron_config.is_eagle_draft
        assert each.fused_spec_config.worker_cls is NeuronDeepseekV3Model
        assert each.fused_spec_config.draft_model_path == str(drafted["half"])
        assert draft.neuron_config.is_eagle_draft
        assert not draft.neuron_config.enable_fused_speculation
        assert draft.neuron_config.speculation_length == 2
        assert draft.model == each.model


def speculating(model_dir, **neuron):
    return load_config(model_dir, enable_eagle_speculation=True, **neuron)


def test_a_draft_of_another_model_is_refused(drafted):
    config = speculating(drafted["half"])
    other = draft_config(config)
    other.vocab_size += 8
    config.fused_spec_config = FusedSpecNeuronConfig(NeuronDeepseekV3Model, draft_config=other, draft_model_path="x")
    with pytest.raises(ConfigError, match="draft model: vocab_size 264 is not the model's 256"):
        NeuronDeepseekV3ForCausalLM(str(drafted["half"]), config)


SAMPLING = {"do_sample": True, "dynamic": True}
REFUSED = {
    "is_eagle3": True,
    "enable_eagle_draft_input_norm": True,
    "token_tree_config": {"0": ["1"]},
    "async_mode": True,
    "output_logits": True,
    "sequence_parallel_enabled": True,
    "on_device_sampling_config": SAMPLING,
}


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_were_not_tried_together_are_refused(drafted, field):
    with pytest.raises(ConfigError, match=f"{field}.* not supported with"):
        speculating(drafted["half"], **{field: REFUSED[field]})


def test_cpu_mode_is_refused_in_a_line(drafted):
    model = NeuronDeepseekV3ForCausalLM(str(drafted["half"]), speculating(drafted["half"]))
    with pytest.raises(ConfigError, match="Speculation is not yet supported for CPU inference"):
        model.to_cpu()
