"""Models on device graphs, and what is asked of their tokens. For processes that are prepared for it."""

import torch
from nxdi_deepseek.accuracy.reference import hugging_face_model, reference_logits
from nxdi_deepseek.application import NeuronDeepseekV3ForCausalLM
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.device_graphs.loading import load_on_device_graphs

from support.models import Session, greedy, load_config

TOLERANCE = 1e-4


def load(model_dir, compiled_path=None, **neuron):
    """The causal LM, and its DeviceModel."""
    model = NeuronDeepseekV3ForCausalLM(str(model_dir), load_config(model_dir, **neuron))
    return model, load_on_device_graphs(model, compiled_path)


def written(folder, config):
    write_checkpoint(folder, config, seed=0)
    return folder


def assert_equals_hugging_face(model, model_dir, prompts, new_tokens=12):
    """Every logit within TOLERANCE of Hugging Face's, which is fed the same tokens. Returns the logits."""
    tokens, logits = greedy(model, prompts, new_tokens)
    reference = hugging_face_model(model_dir)
    for row, prompt in enumerate(prompts):
        golden = reference_logits(reference, prompt + tokens[row].tolist())[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row], golden, rtol=0, atol=TOLERANCE)
    return logits


class TokenSession(Session):
    """A session of a model that samples on the device: what it returns are tokens [B]."""

    def __init__(self, model, sampling_params=None):
        super().__init__(model)
        self.sampling_params = sampling_params

    @torch.no_grad()
    def _run(self, ids, slots, **inputs):
        params = None if self.sampling_params is None else self.sampling_params.clone()
        output = self.model(input_ids=ids, seq_ids=torch.tensor(slots), sampling_params=params, **inputs)
        return output.tokens.clone()

    def generate(self, prompts, new_tokens):
        """[B, T]."""
        tokens = [self.prefill(prompts)]
        while len(tokens) < new_tokens:
            tokens.append(self.decode(tokens[-1].tolist()))
        return torch.stack(tokens, dim=1)


def top_k_top_p_at_one_half(logits, top_k, top_p, temperature):
    """The token at which the probabilities that top-k and top-p leave, in descending order, add up to one half."""
    values, index = (logits / temperature).sort(descending=True)
    values, index = values[:top_k], index[:top_k]
    above = values.softmax(-1).cumsum(-1) > top_p
    above[0] = False
    probabilities = values.masked_fill(above, float("-inf")).softmax(-1)
    return index[(probabilities.cumsum(-1) < 0.5).sum()]
