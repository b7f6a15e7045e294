"""What generation must do on every backend; a test module runs it by importing all of it."""

import json
import re

import pytest
import torch
from nxdi_deepseek import backend
from nxdi_deepseek.accuracy.reference import hugging_face_model
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.commands.generate import right_pad
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.modeling_deepseek import DeepseekV3InferenceConfig, DeepseekV3NeuronConfig
from transformers import GenerationConfig, LogitsProcessorList, MinLengthLogitsProcessor, set_seed
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

from support.models import V3, Session, greedy, load_model, random_prompts

NEW_TOKENS = 8
# Uneven, and one of a single token, which NxDI's own adapter continues at a wrong position.
PROMPTS = random_prompts((5, 1, 12, 2))
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("generation")
    write_checkpoint(path, V3)
    return path


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir, batch_size=len(PROMPTS))


@pytest.fixture
def adapter(model):
    """An adapter of its own for every test; the model is shared."""
    adapter = backend.HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None
    adapter.generation_config.pad_token_id = 0
    return adapter


@pytest.fixture(scope="module")
def reference(model_dir):
    model = hugging_face_model(model_dir)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def batch(model):
    ids, mask = right_pad(PROMPTS, model.config)
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW_TOKENS}


def their_tokens(reference, prompt, **arguments):
    """transformers' continuation of one prompt."""
    arguments = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0} | arguments
    ids = torch.tensor([prompt])
    return reference.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(prompt) :].tolist()


def their_batch(reference, **arguments):
    return [their_tokens(reference, prompt, **arguments) for prompt in PROMPTS]


def new_tokens(output, batch):
    return output[:, batch["input_ids"].shape[1] :].tolist()


def test_greedy_equals_transformers_for_uneven_prompts(adapter, reference, batch):
    assert new_tokens(adapter.generate(**batch, do_sample=False), batch) == their_batch(reference)


def test_sampling_equals_transformers_for_one_seed(adapter, reference):
    prompt = torch.tensor([PROMPTS[0]])
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    set_seed(3)
    ours = adapter.generate(prompt, **arguments, **SAMPLING)
    set_seed(3)
    assert ours.tolist() == reference.generate(prompt, **arguments, **SAMPLING).tolist()
    set_seed(4)
    assert ours.tolist() != adapter.generate(prompt, **arguments, **SAMPLING).tolist()


def test_one_adapter_samples_after_greedy_and_is_greedy_after_sampling(adapter, reference, batch):
    greedy_tokens = new_tokens(adapter.generate(**batch, do_sample=False), batch)
    set_seed(0)
    first = new_tokens(adapter.generate(**batch, **SAMPLING), batch)
    set_seed(1)
    second = new_tokens(adapter.generate(**batch, **SAMPLING), batch)
    assert greedy_tokens != first != second
    assert new_tokens(adapter.generate(**batch, do_sample=True, top_k=1), batch) == greedy_tokens
    assert new_tokens(adapter.generate(**batch, do_sample=False), batch) == greedy_tokens == their_batch(reference)


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_changes_nothing(adapter, reference, batch, use_cache):
    tokens = new_tokens(adapter.generate(**batch, do_sample=False, use_cache=use_cache), batch)
    assert tokens == their_batch(reference)


def test_padding_is_found_by_its_token(adapter, reference, batch):
    batch.pop("attention_mask")
    assert new_tokens(adapter.generate(**batch, do_sample=False), batch) == their_batch(reference)


def test_generation_config_as_argument(adapter, reference, batch):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, repetition_penalty=1.8)
    batch.pop("max_new_tokens")
    rows = new_tokens(adapter.generate(**batch, generation_config=config), batch)
    # The penalty of a padded row would count its padding too, as in transformers.
    longest = max(range(len(PROMPTS)), key=lambda row: len(PROMPTS[row]))
    assert rows[longest] == their_tokens(reference, PROMPTS[longest], max_new_tokens=3, repetition_penalty=1.8)


def test_max_length_counts_the_prompt(adapter, batch):
    batch.pop("max_new_tokens")
    assert adapter.generate(**batch, do_sample=False, max_length=15).shape == (len(PROMPTS), 15)


def test_scores_and_logits_are_those_of_the_tokens(adapter, batch):
    batch["max_new_tokens"] = 3
    output = adapter.generate(
        **batch, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    expected = greedy(adapter.neuron_model, PROMPTS, 3)[1]
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=0, atol=1e-4)
    assert torch.equal(torch.stack(output.scores, 1).argmax(-1), output.sequences[:, -3:])


def test_stop_tokens_end_each_sequence(adapter, reference, batch):
    stop = their_batch(reference)[0][3]
    rows = new_tokens(adapter.generate(**batch, do_sample=False, eos_token_id=stop), batch)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        expected = their_tokens(reference, prompt, eos_token_id=stop)
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {0}


def test_processors_and_criteria_of_the_caller(adapter, reference, batch):
    class Only(MinLengthLogitsProcessor):
        def __init__(self):
            pass

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([77]), 0.0)

    width = batch["input_ids"].shape[1]
    criteria = StoppingCriteriaList([MaxLengthCriteria(width + 2)])
    rows = new_tokens(
        adapter.generate(**batch, logits_processor=LogitsProcessorList([Only()]), stopping_criteria=criteria), batch
    )
    assert rows == [[77, 77]] * len(PROMPTS)


def test_sequences_of_one_prompt(adapter):
    prompt = torch.tensor([PROMPTS[0]])
    set_seed(0)
    output = adapter.generate(
        prompt, do_sample=True, num_return_sequences=3, max_new_tokens=NEW_TOKENS, temperature=2.0
    )
    assert len({tuple(row) for row in output.tolist()}) == 3


def test_streamer_gets_every_token(adapter, batch):
    from nxdi_deepseek.streaming import BatchStreamer

    steps = []
    output = adapter.generate(**batch, do_sample=False, streamer=BatchStreamer(steps.append))
    assert torch.tensor(steps[:-1]).T.tolist() == new_tokens(output, batch)
    assert steps[-1] is None


REFUSED = {
    "beams": ({"num_beams": 2}, "beam_search is not supported"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam_sample is not supported"),
    "beams of a config": ({"generation_config": GenerationConfig(num_beams=3)}, "beam_search is not supported"),
    "copies of a greedy sequence": ({"num_return_sequences": 2}, "num_return_sequences"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted_generation is not supported"),
    "assistant": ({"assistant_model": object()}, "assistant_model is not supported"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 2, 3)}, "inputs_embeds is not supported"),
    "cache": ({"past_key_values": ()}, "past_key_values is not supported"),
    "positions": ({"position_ids": torch.zeros(1, 2)}, "position_ids is not supported"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "guidance": ({"guidance_scale": 2.0}, "guidance_scale"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "attention weights": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "negative temperature": ({"do_sample": True, "temperature": -1.0}, "temperature"),
    "top_p above 1": ({"do_sample": True, "top_p": 2.0}, "top_p"),
    "misspelt": ({"max_new_token": 3}, "max_new_token"),
    "no new tokens": ({"max_new_tokens": 0}, "max_length|max_new_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_would_be_ignored_or_wrong(adapter, batch, name):
    arguments, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as error:
        adapter.generate(**(batch | {"do_sample": False} | arguments))
    assert "\n" not in str(error.value)


BAD_MASKS = {
    "left padding": ([[0, 1, 1]], "padded on the left"),
    "a hole": ([[1, 0, 1]], "has holes"),
    "nothing": ([[0, 0, 0]], "empty prompt"),
    "too short": ([[1, 1]], r"shape \[1, 2\] for input_ids of shape \[1, 3\]"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_masks_that_are_not_right_padding(model, adapter, name):
    mask, message = BAD_MASKS[name]
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor(mask)
    with pytest.raises(ConfigError, match=message):
        adapter.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ConfigError, match=message):
        model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(3)[None])


@pytest.mark.parametrize(
    "ids", [torch.zeros(1, 0, dtype=torch.int64), None, [[5]], torch.tensor([5]), torch.ones(1, 2)]
)
def test_prompts_that_are_none(adapter, ids):
    with pytest.raises(ConfigError, match="empty prompt|input_ids"):
        adapter.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("token", [-1, V3["vocab_size"]])
def test_tokens_outside_the_vocabulary(model, adapter, token):
    with pytest.raises(ConfigError, match=f"token id {token} is outside the vocabulary of 256"):
        adapter.generate(torch.tensor([[5, token]]), attention_mask=torch.ones(1, 2), max_new_tokens=2)
    Session(model).prefill([[5, 6]])
    with pytest.raises(ConfigError, match=f"token id {token} is outside the vocabulary of 256"):
        model(input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[2]]))


STEPS = {
    "a gap": ({"position_ids": [[4]]}, "position 4 does not follow the 3 cached in slot 0"),
    "a second chunk": ({"input_ids": [[5, 6]], "position_ids": [[3, 4]]}, "a prompt must start at position 0"),
    "prompt and step": (
        {"input_ids": [[5], [6]], "position_ids": [[3], [0]]},
        "send prompts and steps apart",
    ),
    "a mask of another length": ({"attention_mask": [[1, 1]], "position_ids": [[3]]}, "differ in the number of cached"),
    "a slot never filled": (
        {"position_ids": [[3]], "seq_ids": [3]},
        "position 3 does not follow the 0 cached in slot 3",
    ),
    "a slot twice": ({"input_ids": [[5], [6]], "position_ids": [[3], [3]], "seq_ids": [0, 0]}, "name a slot twice"),
    "embeddings": ({"inputs_embeds": [[1.0]]}, "inputs_embeds is not supported"),
    "sampling parameters of fewer": ({"sampling_params": []}, "0 rows of sampling_params for 1 sequences"),
    "no positions": ({"position_ids": None}, "forward needs input_ids and position_ids"),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_do_not_follow(model_dir, name):
    request, message = STEPS[name]
    model = load_model(model_dir, batch_size=4)
    Session(model).prefill([[5, 6, 7]])
    request = {"input_ids": [[5]], "position_ids": [[3]]} | request
    tensors = {key: None if value is None else torch.tensor(value) for key, value in request.items()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        model(**tensors)


def test_steps_of_some_slots_leave_the_others_alone(model_dir):
    """NxDI fills a batch with copies of its first row, in the slots that are left out."""
    batching = {"is_continuous_batching": True, "ctx_batch_size": 1, "tkg_batch_size": 3, "max_batch_size": 3}
    model = load_model(model_dir, batch_size=3, **batching)
    prompts = random_prompts((6, 20, 3))
    session = Session(model)
    rows = {slot: [session.prefill([prompts[slot]], [slot])[0]] for slot in range(3)}
    for slots in ([0, 2], [2, 0], [2], [2, 0], [1], [1, 0], [0, 1, 2]):
        newest = [rows[slot][-1].argmax().item() for slot in slots]
        for slot, row in zip(slots, session.decode(newest, slots), strict=True):
            rows[slot].append(row)
    for slot, prompt in enumerate(prompts):
        expected = greedy(model, [prompt], len(rows[slot]))[1][0]
        torch.testing.assert_close(torch.stack(rows[slot]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("slots, batch_size", [([2, 0, 1], 3), ([2, 0], 3), ([0, 1, 2], 3), ([3, 1], 4)])
def test_everything_in_the_output_is_in_the_order_of_the_request(model_dir, monkeypatch, slots, batch_size):
    """Of a base class that answers every sequence with its own slot."""
    model = load_model(model_dir, batch_size=batch_size)
    Session(model).prefill([[5, 6]] * batch_size)
    seen = {}

    def answer(self, input_ids, seq_ids, **inputs):
        seen.update(inputs, input_ids=input_ids, seq_ids=seq_ids)
        output = backend_output(logits=seq_ids[:, None, None] * 10.0, hidden_states=[seq_ids + 200, seq_ids + 300])
        output.tokens = seq_ids + 100
        return output

    from transformers.modeling_outputs import CausalLMOutputWithPast as backend_output

    monkeypatch.setattr(backend.NeuronBaseForCausalLM, "forward", answer)
    slots = torch.tensor(slots)
    output = model(
        input_ids=slots[:, None] + 50,
        position_ids=torch.full((len(slots), 1), 2),
        seq_ids=slots,
        sampling_params=slots[:, None] * torch.ones(1, 3),
    )
    assert torch.equal(output.tokens, slots + 100)
    assert torch.equal(output.logits[:, 0, 0], slots * 10.0)
    assert [states.tolist() for states in output.hidden_states] == [(slots + 200).tolist(), (slots + 300).tolist()]
    assert torch.equal(seen["seq_ids"], seen["seq_ids"].sort().values)
    for slot in slots.tolist():
        (row,) = (seen["seq_ids"] == slot).nonzero()[0].tolist()
        assert seen["input_ids"][row].tolist() == [slot + 50]
        assert seen["sampling_params"][row].tolist() == [slot] * 3


NEURON_VALUES = {
    "seq_len": "128",
    "batch_size": -1,
    "tp_degree": 0,
    "max_context_length": 1.5,
    "enable_bucketing": "no",
    "torch_dtype": "fp8",
    "context_encoding_buckets": [128, 64],
    "token_generation_buckets": 64,
}


@pytest.mark.parametrize("field", NEURON_VALUES)
def test_neuron_config_values_of_the_wrong_kind(field):
    with pytest.raises(ConfigError, match=f"neuron_config: {field} "):
        DeepseekV3NeuronConfig(**{field: NEURON_VALUES[field]})


@pytest.mark.parametrize("text", [None, "", "[]", "{", "{}", '{"neuron_config": 3}', '{"neuron_config": []}'])
def test_damaged_neuron_config_json(tmp_path, text):
    if text is not None:
        (tmp_path / "neuron_config.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        DeepseekV3InferenceConfig.load(tmp_path)
    assert "\n" not in str(error.value)


def test_saved_config_comes_back(tmp_path, model):
    model.config.save(tmp_path)
    loaded = DeepseekV3InferenceConfig.load(str(tmp_path))
    assert loaded.model == model.config.model
    assert loaded.neuron_config.batch_size == len(PROMPTS)
    assert json.loads((tmp_path / "neuron_config.json").read_text())["neuron_config"]["torch_dtype"] == "float32"
