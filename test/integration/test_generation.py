"""Generation on real NxDI, in its CPU mode."""

from support import nxdi

nxdi.require_nxdi()

import pytest  # noqa: E402
import torch  # noqa: E402
from neuronx_distributed_inference.models.config import OnDeviceSamplingConfig  # noqa: E402
from neuronx_distributed_inference.utils.hf_adapter import HuggingFaceGenerationAdapter  # noqa: E402
from nxdi_deepseek import backend  # noqa: E402
from nxdi_deepseek.commands.generate import right_pad  # noqa: E402
from nxdi_deepseek.errors import ConfigError  # noqa: E402
from support.generation_suite import *  # noqa: E402, F403
from support.generation_suite import PROMPTS, new_tokens, their_batch  # noqa: E402
from support.models import Session, load_model, random_prompts  # noqa: E402


def on_device(model_dir, output_logits=False, **sampling):
    """An adapter whose tokens come out of the model; the uneven prompts, right-padded."""
    sampling = OnDeviceSamplingConfig(**({"global_topk": 64} | sampling))
    model = load_model(
        model_dir,
        batch_size=len(PROMPTS),
        on_cpu=True,
        on_device_sampling_config=sampling,
        output_logits=output_logits,
    )
    adapter = backend.HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id, adapter.generation_config.pad_token_id = None, 0
    return adapter


def test_nxdis_own_adapter_decodes_a_prompt_of_one_token_at_its_position(model, reference, batch):
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id, adapter.generation_config.pad_token_id = None, 0
    assert new_tokens(adapter.generate(**batch, do_sample=False), batch) == their_batch(reference)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "dynamic": True}])
def test_greedy_on_the_device_equals_transformers(model_dir, reference, batch, sampling):
    adapter = on_device(model_dir, **sampling)
    assert new_tokens(adapter.generate(**batch, do_sample=False), batch) == their_batch(reference)


def test_on_device_sampling_gives_each_row_its_own_tokens(model_dir, reference):
    model = on_device(model_dir, dynamic=True, do_sample=True).neuron_model
    ids, mask = right_pad(PROMPTS, model.config)
    slots, expected = torch.tensor([2, 0, 3, 1]), their_batch(reference)
    positions = (mask.cumsum(-1) - 1).where(mask > 0, 1)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, seq_ids=slots)
    for step in range(1, 4):
        assert output.tokens.tolist() == [row[step - 1] for row in expected]
        rows = torch.tensor([3, 0, 1]) if step % 2 else torch.arange(4)
        output = model(
            input_ids=torch.tensor([[row[step - 1]] for row in expected]),
            position_ids=mask.sum(-1, keepdim=True) + step - 1,
            seq_ids=slots,
        )
        some = model(
            input_ids=torch.tensor([[row[step - 1]] for row in expected])[rows],
            position_ids=(mask.sum(-1, keepdim=True) + step - 1)[rows],
            seq_ids=slots[rows],
        )
        assert some.tokens.tolist() == output.tokens[rows].tolist()


ON_DEVICE_REFUSED = {
    "sampling that is not compiled": ({}, {"do_sample": True}, "do_sample=True needs do_sample or dynamic"),
    "a fixed temperature": ({"do_sample": True}, {"do_sample": True, "temperature": 0.5}, "need dynamic=True"),
    "all tokens": ({"dynamic": True, "do_sample": True}, {"do_sample": True, "top_k": 0}, "top_k must be at least 1"),
    "a penalty": ({}, {"repetition_penalty": 2.0}, "RepetitionPenaltyLogitsProcessor would be ignored"),
    "a minimum": ({}, {"min_new_tokens": 2, "eos_token_id": 9}, "MinNewTokensLengthLogitsProcessor would be ignored"),
    "scores": ({}, {"output_scores": True, "return_dict_in_generate": True}, "need output_logits=True"),
}


@pytest.mark.parametrize("name", ON_DEVICE_REFUSED)
def test_what_the_device_would_ignore(model_dir, batch, name):
    sampling, arguments, message = ON_DEVICE_REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        on_device(model_dir, **sampling).generate(**(batch | {"do_sample": False} | arguments))


def test_prompts_fewer_than_a_batch_start_over(model_dir):
    """NxDI fills a batch of prompts with copies of the first, in the slots that are left out."""
    session = Session(load_model(model_dir, batch_size=3))
    session.prefill(random_prompts((4, 5, 6)))
    session.prefill(random_prompts((3,)), [1])
    with pytest.raises(ConfigError, match="position 4 does not follow the 0 cached in slot 0"):
        session.decode([7], [0])
