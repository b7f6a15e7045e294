"""NxDI's fused model as a module on the CPU, where NxDI itself refuses to run it (its graphs alone have speculation).

Caches and hidden states are stored by hand, as the aliases of a traced graph do; the token of the most likely logit is
found by torch, over all ranks, where NxDI's CPU mode looks at a rank's own part of the vocabulary.
"""

import importlib
from types import SimpleNamespace

import torch
from neuronx_distributed.trace.trace import get_sharded_checkpoint
from neuronx_distributed_inference.models.model_base import NeuronFusedSpecModel
from nxdi_deepseek.application import NeuronDeepseekV3ForCausalLM

from support import nxdi
from support.models import load_config


class FusedModule:
    """The fused module of a checkpoint on this rank. draft_states: hidden states [B, S, H] of each run of the draft."""

    def __init__(self, model_dir, monkeypatch, length=2, **neuron):
        nxdi.init_cpu_parallel(neuron.get("tp_degree", 1))
        operator = importlib.import_module("neuronx_distributed.operators.argmax")
        monkeypatch.setattr(operator, "Argmax", SimpleNamespace(apply=torch.argmax))
        neuron |= {"enable_eagle_speculation": True, "speculation_length": length, "disable_argmax_kernel": True}
        config = load_config(model_dir, **neuron)
        application = NeuronDeepseekV3ForCausalLM(str(model_dir), config)
        self.config = config
        parallel_state = importlib.import_module("neuronx_distributed.parallel_layers.parallel_state")
        monkeypatch.setattr(parallel_state, "_SPECULATIVE_DRAFT_GROUP", None)  # NxD leaves the last one
        parallel_state.initialize_speculative_draft_group(config.neuron_config.tp_degree)
        self.module = NeuronFusedSpecModel(config)
        state_dict = application.checkpoint_loader_fn()
        rank = torch.distributed.get_rank()
        get_sharded_checkpoint(state_dict, self.module, rank, config.neuron_config.tp_degree)
        missing, unexpected = self.module.load_state_dict(state_dict, strict=False)
        assert not unexpected
        assert all("kv_mgr" in name or "rolling_buffer" in name for name in missing), missing
        self.module.eval()
        self.draft_states = []
        self.module.draft_model.layers[0].register_forward_hook(
            lambda layer, args, output: self.draft_states.append(output[0])
        )

    @torch.no_grad()
    def __call__(self, input_ids, attention_mask, position_ids):
        """Accepted tokens, the next tokens, mask and positions."""
        seq_ids = torch.arange(len(input_ids))
        self.module.n_positions = attention_mask.shape[1]
        for model in (self.module.draft_model, self.module.target_model):
            model.n_positions = attention_mask.shape[1]
        outputs = self.module(input_ids, attention_mask, position_ids, seq_ids, torch.ones(len(input_ids), 3))
        states = [*self._caches(self.module.draft_model), *self._caches(self.module.target_model)]
        states.append(self.module.hidden_state_rolling_buffer.hidden_states)
        for state, value in zip(states, outputs[4:], strict=True):
            state.data = value
        return outputs[:4]

    @staticmethod
    def _caches(model):
        return model.kv_mgr.past_key_values

    def run(self, prompts, steps):
        """The tokens of each row behind its prompt, and for each step (tokens ahead, drafted tokens, hidden states)."""
        length, width = self.config.neuron_config.seq_len, self.config.neuron_config.max_context_length
        ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width).long()
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        tokens, last, mask, position = self(ids, mask, positions)
        rows = [[*prompt, token] for prompt, token in zip(prompts, tokens[:, 0].tolist(), strict=True)]
        drafts, drafted = [], self.config.neuron_config.speculation_length - 1
        candidates = []
        hook = self.module.target_model.embed_tokens.register_forward_pre_hook(
            lambda module, args: candidates.append(args[0])
        )
        for _ in range(steps):
            self.draft_states.clear()
            candidates.clear()
            known = [list(row) for row in rows]
            position = position.long()
            mask = (torch.arange(length) < position).long()
            tokens, last, mask, position = self(last.long(), mask, position)
            drafts.append((known, candidates[0][:, 1:].tolist(), self.draft_states[0][:, 0]))
            assert candidates[0].shape[1] == drafted + 1
            for row, found in zip(rows, tokens.tolist(), strict=True):
                row += [token for token in found if token >= 0]
        hook.remove()
        return rows, drafts
