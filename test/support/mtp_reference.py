"""The MTP layer written from the paper (arXiv:2412.19437, section 2.2) around transformers' own modules, uncached."""

import torch
from nxdi_deepseek.accuracy.reference import Weights, hugging_face_config, hugging_face_model, judge_class
from nxdi_deepseek.checkpoint.folder import Checkpoint
from torch.nn.functional import rms_norm


class ReferenceMTP:
    """A checkpoint folder in float32: the model, and its first MTP layer as the draft of it."""

    def __init__(self, model_dir):
        self.model = hugging_face_model(model_dir)
        with Checkpoint(model_dir) as checkpoint:
            config, weights = checkpoint.config, Weights(checkpoint, torch.float32)
            prefix, hf_config = f"model.layers.{config.num_hidden_layers}.", hugging_face_config(checkpoint)
            self._eps = config.rms_norm_eps
            layer_class = judge_class(config, "DecoderLayer")
            with torch.device("meta"):
                self._layer = layer_class(hf_config, config.num_hidden_layers)
            tensors = {name: _tensor(weights, prefix, name, config) for name in self._layer.state_dict()}
            self._layer.load_state_dict(tensors, assign=True)
            self._layer.eval()
            names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
            self._own = {name: weights.get(f"{prefix}{name}.weight") for name in names}

    @torch.no_grad()
    def greedy(self, prompt, count):
        """The model's own greedy tokens behind one prompt."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    @torch.no_grad()
    def draft(self, tokens, count):
        """The `count` tokens drafted behind `tokens`, and the hidden state [H] ahead of the head for the first.

        The model's hidden states are known for all tokens but the last; for those drafted, the draft's own stand in.
        """
        hidden = self.model.model(torch.tensor([tokens[:-1]]), use_cache=False).last_hidden_state[0]
        following, drafted, first = list(tokens[1:]), [], None
        for _ in range(count):
            y = self._forward(following, hidden)[-1]
            first = y if first is None else first
            token = int(self.model.lm_head(y).argmax())
            drafted.append(token)
            following.append(token)
            hidden = torch.cat((hidden, y[None]))
        return drafted, first

    def _forward(self, following, hidden):
        """t_1..t_n and h_0..h_{n-1} to the hidden states [n, H] that predict t_2..t_{n+1}."""
        embedded = self.model.model.embed_tokens(torch.tensor(following))
        joined = torch.cat((self._norm("enorm", embedded), self._norm("hnorm", hidden)), dim=-1)
        x, positions = (joined @ self._own["eh_proj"].T)[None], torch.arange(len(following))[None]
        causal = torch.full((len(following), len(following)), float("-inf")).triu(1)[None, None]
        rope = self.model.model.rotary_emb(x, positions)
        y = self._layer(x, attention_mask=causal, position_ids=positions, position_embeddings=rope)
        y = y[0] if isinstance(y, tuple) else y
        return self._norm("shared_head.norm", y.view(len(following), -1))

    def _norm(self, name, x):
        return rms_norm(x, x.shape[-1:], self._own[name], self._eps)


def _tensor(weights, prefix, name, config):
    """transformers 5 has one tensor for the experts of a layer."""
    fused = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
    if name not in fused:
        return weights.get(prefix + name)
    experts = (f"{prefix}mlp.experts.{expert}." for expert in range(config.n_routed_experts))
    return torch.stack([torch.cat([weights.get(f"{e}{kind}.weight") for kind in fused[name]]) for e in experts])
