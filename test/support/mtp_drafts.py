"""Checkpoints whose MTP layer drafts as well as asked, and mistakes to be planted in it."""

import torch
from nxdi_deepseek import modeling_deepseek
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.modeling_deepseek import DeepseekV3MTPLayer, NeuronDeepseekV3DecoderLayer
from nxdi_deepseek.mtp import MTPInput

from support.encodings import edit
from support.models import V3

DRAFTED = V3 | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2}
MTP_LAYER = f"model.layers.{DRAFTED['num_hidden_layers']}."
PROMPT_LENGTHS = (17, 5, 9)
# How much of each layer's output the residual stream takes: with little of it, the next token follows from the last
# one alone, which is what a draft that passes the embedding on will say too. And how much of its random weights eh_proj
# keeps beside the identity: the first draft has nothing else.
RESIDUALS = {"none": (0.5, None), "half": (0.03, 0.02), "most": (0.003, 0.002)}
# What the acceptance of each is, to tell a constructed draft from a broken one.
ACCEPTANCE = {"none": (0.0, 0.1), "half": (0.25, 0.75), "most": (0.8, 1.0)}


def write_drafted(model_dir, kind, **fields):
    """A float32 checkpoint with an MTP layer whose drafts are accepted never, about half of the time, or mostly.
    kind None: with weights as write_checkpoint makes them, of any format."""
    write_checkpoint(model_dir, DRAFTED | fields)
    if kind:
        edit(model_dir, lambda tensors: _tuned(tensors, *RESIDUALS[kind]))
    return model_dir


def _tuned(tensors, residual, noise):
    def tune(name, tensor):
        if name == MTP_LAYER + "eh_proj.weight" and noise is not None:
            hidden = tensor.shape[0]
            return torch.cat((torch.eye(hidden) + noise * tensor[:, :hidden], noise * tensor[:, hidden:]), dim=1)
        if name == MTP_LAYER + "enorm.weight":
            return torch.ones_like(tensor)
        if name in (MTP_LAYER + "shared_head.norm.weight", "model.norm.weight"):
            return 1 + 0.2 * torch.arange(len(tensor)).cos()
        return tensor * residual if name.endswith(("o_proj.weight", "down_proj.weight")) else tensor

    return {name: tune(name, tensor) for name, tensor in tensors.items()}


def swapped_concatenation(monkeypatch, target):
    """The hidden state ahead of the embedding, as the paper prints it."""
    join = MTPInput.forward_wg

    def swapped(self, joined, weight_gather):
        return join(self, torch.cat(joined.tensor_split(2, dim=-1)[::-1], dim=-1), weight_gather)

    monkeypatch.setattr(MTPInput, "forward_wg", swapped)


def hidden_before_the_final_norm(monkeypatch, target):
    """hnorm takes scale out, so that the hidden state ahead of the norm differs by the norm's weights alone."""
    join, weight = MTPInput.forward_wg, target.norm.weight

    def pre_norm(self, joined, weight_gather):
        embedded, hidden = joined.tensor_split(2, dim=-1)
        return join(self, torch.cat((embedded, hidden / weight), dim=-1), weight_gather)

    monkeypatch.setattr(MTPInput, "forward_wg", pre_norm)


def no_norm_ahead_of_the_head(monkeypatch, target):
    monkeypatch.setattr(DeepseekV3MTPLayer, "forward", NeuronDeepseekV3DecoderLayer.forward)


def active_mask_ignored(monkeypatch, target):
    """Each of several new tokens sees those behind it."""
    attend = modeling_deepseek.absorbed_attention

    def unmasked(*args):
        *ahead, _, scale = args
        return attend(*ahead, None, scale)

    monkeypatch.setattr(modeling_deepseek, "absorbed_attention", unmasked)


FAULTS = [swapped_concatenation, hidden_before_the_final_norm, no_norm_ahead_of_the_head, active_mask_ignored]
