"""The fused graphs of model and MTP draft, as NxDI traces them."""

import pytest
from nxdi_deepseek.backend import HuggingFaceGenerationAdapter
from nxdi_deepseek.commands.generate import right_pad
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import load
from support.models import V3, random_prompts
from support.mtp_drafts import PROMPT_LENGTHS, write_drafted
from support.mtp_reference import ReferenceMTP

NEW_TOKENS = 10
WIDE = WIDE_CONFIG | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2}
WIDE = {name: value for name, value in WIDE.items() if name != "quantization_config"}


@pytest.mark.parametrize(
    ("config", "tp_degree", "length"), [(V3, 2, 3), (WIDE, 64, 2)], ids=["TP 2, 3 tokens", "TP 64, 2 tokens"]
)
def test_tokens_are_those_of_hugging_face(tmp_path, config, tp_degree, length):
    model_dir = write_drafted(tmp_path, "half", **config | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2})
    prompts = random_prompts(PROMPT_LENGTHS, config["vocab_size"])
    neuron = {"batch_size": len(prompts), "max_context_length": 64, "tp_degree": tp_degree}
    model, device = load(model_dir, enable_eagle_speculation=True, speculation_length=length, **neuron)
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id, adapter.generation_config.pad_token_id = None, 0
    ids, mask = right_pad(prompts, model.config)
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "speculation": "mtp"}
    tokens = adapter.generate(ids, attention_mask=mask, **asked)[:, ids.shape[1] :]
    reference = ReferenceMTP(model_dir)
    assert tokens.tolist() == [reference.greedy(prompt, NEW_TOKENS) for prompt in prompts]
    assert 0.1 < adapter.speculation_counts.acceptance < 0.9
