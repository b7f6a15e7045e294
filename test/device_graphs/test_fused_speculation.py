"""The fused graphs of model and MTP draft, as NxDI traces them."""

import pytest
import torch
from nxdi_deepseek.application import NeuronDeepseekV3ForCausalLM
from nxdi_deepseek.backend import HuggingFaceGenerationAdapter
from nxdi_deepseek.commands.generate import right_pad
from nxdi_deepseek.device_graphs.loading import load_on_device_graphs
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import load
from support.models import V3, load_config, random_prompts
from support.mtp_drafts import PROMPT_LENGTHS, write_drafted
from support.mtp_reference import ReferenceMTP
from support.mtp_suite import expected_counts

NEW_TOKENS = 10


@pytest.mark.parametrize("kind", ["none", "half", "most"])
@pytest.mark.parametrize(
    ("config", "tp_degree", "length"),
    [(V3, 2, 3), (WIDE_CONFIG, 64, 2), (WIDE_CONFIG, 64, 3)],
    ids=["TP 2, 3 tokens", "TP 64, 2 tokens", "TP 64, 3 tokens"],
)
def test_tokens_are_those_of_hugging_face_and_drafts_the_references(tmp_path, config, tp_degree, length, kind):
    """A draft that is not the reference's would be accepted at other steps."""
    model_dir = write_drafted(tmp_path, kind, **config | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2})
    prompts = random_prompts(PROMPT_LENGTHS, config["vocab_size"])
    neuron = {"batch_size": len(prompts), "max_context_length": 64, "tp_degree": tp_degree}
    model, device = load(model_dir, enable_eagle_speculation=True, speculation_length=length, **neuron)
    tokens, counts = generated(model, prompts)
    reference = ReferenceMTP(model_dir)
    assert tokens == [reference.greedy(prompt, NEW_TOKENS) for prompt in prompts]
    assert (counts.steps, counts.accepted) == expected_counts(reference, prompts, NEW_TOKENS, length)
    if kind == "most":
        assert counts.acceptance > 0.5


def generated(model, prompts):
    """The new tokens of each prompt, and how many drafts were accepted."""
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id, adapter.generation_config.pad_token_id = None, 0
    ids, mask = right_pad(prompts, model.config)
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "speculation": "mtp"}
    tokens = adapter.generate(ids, attention_mask=mask, **asked)
    return tokens[:, ids.shape[1] :].tolist(), adapter.speculation_counts


def test_a_compiled_folder_keeps_model_and_draft(tmp_path):
    """Sharded by the application, and loaded from its folder alone."""
    (tmp_path / "model").mkdir()
    model_dir, compiled = write_drafted(tmp_path / "model", "half"), str(tmp_path / "compiled")
    prompts = random_prompts(PROMPT_LENGTHS)
    neuron = {"batch_size": len(prompts), "seq_len": 64, "tp_degree": 2, "save_sharded_checkpoint": True}
    config = load_config(model_dir, enable_eagle_speculation=True, **neuron)
    model = NeuronDeepseekV3ForCausalLM(str(model_dir), config)
    model.config.save(compiled)
    model.shard_weights(compiled)
    model.shard_weights(compiled)  # files that are there are kept
    loaded = NeuronDeepseekV3ForCausalLM(compiled)
    load_on_device_graphs(loaded, compiled)
    reference = ReferenceMTP(model_dir)
    assert generated(loaded, prompts)[0] == [reference.greedy(prompt, NEW_TOKENS) for prompt in prompts]


def test_sequences_come_and_wait_in_continuous_batching(tmp_path):
    """Steps of some slots leave tokens, drafts and hidden states of the others alone, in any order of slots."""
    model_dir, prompts = write_drafted(tmp_path, "half"), random_prompts(PROMPT_LENGTHS)
    neuron = {"batch_size": len(prompts), "ctx_batch_size": 1, "seq_len": 64, "max_context_length": 32}
    neuron |= {"is_continuous_batching": True, "tp_degree": 2}
    model, _ = load(model_dir, enable_eagle_speculation=True, **neuron)
    rows = {}

    def start(slot):
        ids = torch.tensor([prompts[slot]])
        positions = torch.arange(ids.shape[1])[None]
        output = model(input_ids=ids, position_ids=positions, seq_ids=torch.tensor([slot]))
        rows[slot] = [*prompts[slot], int(output.fused_outputs[0][0, 0])]

    def step(*slots):
        last = torch.tensor([rows[slot][-1:] for slot in slots])
        positions = torch.tensor([[len(rows[slot]) - 1] for slot in slots])
        output = model(input_ids=last, position_ids=positions, seq_ids=torch.tensor(slots))
        for slot, tokens in zip(slots, output.fused_outputs[0].tolist(), strict=True):
            rows[slot] += [token for token in tokens if token >= 0]

    start(1), step(1), start(0), step(1, 0), start(2)
    step(2, 0, 1), step(0), step(2, 1), step(0), step(1, 2, 0), step(2)
    reference = ReferenceMTP(model_dir)
    for slot, prompt in enumerate(prompts):
        assert rows[slot][len(prompt) :] == reference.greedy(prompt, len(rows[slot]) - len(prompt))
    with pytest.raises(ConfigError, match="the sequence reached seq_len 64"):
        model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[63]]), seq_ids=torch.tensor([0]))
