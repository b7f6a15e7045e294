"""The embedded runtime on a GPU."""

import pytest
import torch
from nxdi_deepseek.backend import HuggingFaceGenerationAdapter
from nxdi_deepseek.commands.generate import right_pad
from nxdi_deepseek.modeling_deepseek import NeuronDeepseekV3ForCausalLM
from nxdi_deepseek.tiny_model import TINY_MODEL_DIR, load_goldens
from support.models import load_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_generation_equals_the_goldens():
    goldens = load_goldens()
    model = NeuronDeepseekV3ForCausalLM(str(TINY_MODEL_DIR), load_config(TINY_MODEL_DIR, batch_size=8, seq_len=656))
    model.load("cuda")
    input_ids, attention_mask = (tensor.cuda() for tensor in right_pad(goldens.prompts, model.config))
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None
    output = adapter.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=goldens.tokens.shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(output.logits, dim=1)
    assert logits.is_cuda
    assert torch.equal(output.sequences[:, input_ids.shape[1] :].cpu(), goldens.tokens)
    torch.testing.assert_close(logits.cpu(), goldens.logits, rtol=0, atol=1e-4)
