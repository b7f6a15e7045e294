"""What the multi-token prediction layer has besides a decoder layer (DeepSeek-V3, arXiv:2412.19437, section 2.2).

For position i, from the hidden state h_i of the model (after its final norm) and the embedding of the next token:

    x = eh_proj([enorm(embed(t_{i+1})) ; hnorm(h_i)])     y = shared_head.norm(layer(x))     logits of t_{i+2} = head(y)

The layer keeps the position of h_i. y is the hidden state that the next token drafted starts from. The paper prints h_i
first; in the released weights the embedding is.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import backend

if TYPE_CHECKING:
    from .config import DeepseekV3InferenceConfig


class MTPInput(nn.Module):
    """Joins the embeddings of tokens with the hidden states ahead of them. Takes the place of the linear layer `fc` of
    NxDI's EAGLE drafts."""

    def __init__(self, config: "DeepseekV3InferenceConfig"):
        super().__init__()
        hidden, norm = config.model.hidden_size, backend.rmsnorm_cls()
        self.enorm = norm(hidden, eps=config.model.rms_norm_eps)
        self.hnorm = norm(hidden, eps=config.model.rms_norm_eps)
        self.eh_proj = backend.ColumnParallelLinear(
            2 * hidden, hidden, bias=False, gather_output=True, dtype=config.neuron_config.torch_dtype
        )

    def forward_wg(self, joined_BS2H: Tensor, weight_gather: bool) -> Tensor:
        """[embeddings ; hidden states] [B, S, 2H] to [B, S, H]. weight_gather: gather the weight, not the tokens, as
        NxDI does for long prompts with sequence parallelism."""
        embedded, hidden = joined_BS2H.tensor_split(2, dim=-1)
        normed = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
        return self.eh_proj.forward_wg(normed, True) if weight_gather else self.eh_proj(normed)
