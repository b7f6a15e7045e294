"""Base model and base causal LM, with the contracts of NxDI's classes of the same names."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import CheckpointError, ConfigError
from ..speculation import draft_config
from .parallel_state import gather_sequence, initialize_model_parallel, split_sequence, tensor_parallel_rank

# The arguments of a model's forward from sampling_params on to slot_mapping, which have no use here.
_NXDIS_OWN = (None,) * 7


class NeuronBaseModel(nn.Module):
    """Decoder stack over a KV cache. A subclass sets its sizes, its modules and its cache manager."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.neuron_config = config, config.neuron_config
        self.setup_attr_for_model(config)
        self.init_model(config)
        self.init_inference_optimization(config)

    def setup_attr_for_model(self, config: Any) -> None:
        raise NotImplementedError

    def init_model(self, config: Any) -> None:
        raise NotImplementedError

    def init_inference_optimization(self, config: Any) -> None:
        """A subclass creates self.kv_mgr here."""

    def _is_context_encoding(self, input_ids: Tensor) -> bool:
        return input_ids.shape[-1] > 1

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        seq_ids: Tensor | slice,
        sampling_params: Tensor | None = None,
        prev_hidden: Tensor | None = None,
        adapter_ids: Tensor | None = None,
        accepted_indices: Tensor | None = None,
        current_length: Tensor | None = None,
        medusa_mask: Tensor | None = None,
        scatter_index: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        active_block_table: Tensor | None = None,
        num_queries: Tensor | None = None,
        computed_context_lens: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 [B, 1, vocab] of each sequence's last token; updates the cache.

        A prompt is right-padded: input_ids, attention_mask, position_ids [B, S]. Decoding takes one token per sequence,
        [B, 1], with attention_mask [B, L] over the L cached positions to read. With a cache in blocks, a prompt's mask
        is over its cached prefix, in the blocks of active_block_table [B, blocks], None where there is none; the new
        tokens' keys go to slot_mapping [B, S]. The arguments stand where NxDI has them; those in between are its own.
        """
        prefill = self._is_context_encoding(input_ids)
        hidden_states = self.hidden_states(
            input_ids,
            attention_mask,
            position_ids,
            seq_ids,
            prefill,
            scatter_index=slot_mapping,
            active_block_table=active_block_table,
        )
        last = position_ids.argmax(dim=-1)
        rows = torch.arange(len(last), device=last.device)
        return self.lm_head(hidden_states[rows, last][:, None]).to(torch.float32)

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        seq_ids: Tensor | slice,
        prefill: bool,
        prev_hidden: Tensor | None = None,
        **blocks: Tensor | None,
    ) -> Tensor:
        """What the head takes, [B, S, H] after the final norm; updates the cache. Arguments as in forward; prefill: a
        prompt, else tokens at position_ids [B, S] behind what is cached. prev_hidden [B, S, H]: for a draft, the hidden
        states ahead of its tokens."""
        self.n_positions = attention_mask.shape[-1]
        return self.get_model_output(
            input_ids=input_ids,
            attention_mask=attention_mask if prefill else attention_mask[:, None, None, :].to(torch.bool),
            position_ids=position_ids,
            seq_ids=seq_ids,
            active_mask=None if prefill else _among_new(input_ids),
            prev_hidden=prev_hidden,
            is_for_context_encoding=prefill,
            **blocks,
        )

    def get_model_output(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        seq_ids: Tensor | slice,
        active_mask: Tensor | None,
        prev_hidden: Tensor | None,
        is_for_context_encoding: bool,
        **blocks: Tensor | None,
    ) -> Tensor:
        """The hidden states [B, S, H] behind the last norm; the new tokens' keys are in the cache. blocks: also what a
        subclass adds for its layers and its cache manager."""
        prefill, tables = is_for_context_encoding, blocks.get("active_block_table")
        cache = None
        if tables is not None or not prefill:
            cache = self.kv_mgr.get_cache(
                seq_len=self.n_positions, seq_ids=seq_ids, is_for_context_encoding=prefill, **blocks
            )
        sequence_parallel = self.neuron_config.sequence_parallel_enabled
        hidden_states = self.embed_tokens(input_ids)
        if self.neuron_config.is_eagle_draft:
            hidden_states = self.fc.forward_wg(torch.cat((hidden_states, prev_hidden), dim=-1), False)
        if sequence_parallel:
            hidden_states = split_sequence(hidden_states)
        new_key_values, cos, sin = [], None, None
        for i, layer in enumerate(self.layers):
            hidden_states, key_value, cos, sin, _ = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=None if cache is None else cache[i],
                active_mask=active_mask,
                cos_cache=cos,
                sin_cache=sin,
                is_for_context_encoding=prefill,
                **blocks,
            )
            new_key_values.append(key_value)
        self.kv_mgr.update_cache(
            is_for_context_encoding=prefill,
            seq_ids=seq_ids,
            position_ids=position_ids,
            new_key_values=new_key_values,
            **blocks,
        )
        if not self.neuron_config.is_eagle_draft:
            hidden_states = self.norm(hidden_states)
        return gather_sequence(hidden_states) if sequence_parallel else hidden_states


class NeuronBaseForCausalLM(nn.Module):
    """A model with its weights and the state of its generation.

    Use: build with a checkpoint folder and a config, call `load()`, then `forward` or HuggingFaceGenerationAdapter.
    """

    _model_cls: type[NeuronBaseModel]

    def __init__(self, model_path: str, config: Any):
        super().__init__()
        self.model_path = model_path
        self.config, self.neuron_config = config, config.neuron_config
        self.kv_cache_populated = False
        self.model: NeuronBaseModel | None = None
        self.draft_model: NeuronBaseModel | None = None

    def to_cpu(self) -> None:
        """NxDI's name for loading without a Neuron device."""
        self.load()

    def load(self, device: torch.device | str = "cpu") -> None:
        """Builds this rank's model on `device` and loads its part of the checkpoint."""
        device = torch.device(device)
        initialize_model_parallel(self.neuron_config.tp_degree, device)
        self.model = self._loaded(self.config, device)
        if self.neuron_config.enable_fused_speculation:
            self.draft_model = self._loaded(draft_config(self.config), device)
            self.draft_model.embed_tokens, self.draft_model.lm_head = self.model.embed_tokens, self.model.lm_head

    def _loaded(self, config: Any, device: torch.device) -> NeuronBaseModel:
        state_dict = self.rank_state_dict(tensor_parallel_rank(), config)
        model = self._model_cls(config)
        missing, _ = model.load_state_dict(state_dict, strict=False, assign=True)
        missing = [name for name in missing if not name.startswith("kv_mgr.")]
        if missing:
            raise CheckpointError(f"the converted checkpoint lacks {', '.join(missing)}")
        return model.to(device).eval()

    def rank_state_dict(self, rank: int, config: Any) -> dict[str, Tensor]:
        """The weights that `rank` holds, by the names of the parameters of the model that has this config."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def reset(self) -> None:
        """Starts over: the next call is a prompt."""
        self.kv_cache_populated = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_ids: Tensor | None = None,
        sampling_params: Tensor | None = None,
        block_table: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        full_context_lens: Tensor | None = None,
        computed_context_lens: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, 1, vocab] of each sequence's last token.

        A call whose smallest position is 0 is a prompt, any other a decoding step. seq_ids [B] are the cache slots,
        0..B-1 if not given. With a cache in blocks, a prompt's first computed_context_lens [1, 1] tokens are in the
        blocks of block_table [B, blocks] already, and slot_mapping [B, S] tells where the new ones go. The caller has
        checked the request (requests.py).
        """
        if self.model is None:
            raise ConfigError("the model has no weights yet; call load() first")
        prefill = position_ids.min().item() == 0
        if attention_mask is None:
            attention_mask = _mask_from_positions(position_ids, prefill)
        blocks: tuple[Tensor | None, ...] = ()
        if block_table is not None:
            counts = full_context_lens - computed_context_lens, computed_context_lens
            arguments, tables = self._in_blocks(
                input_ids, attention_mask, position_ids, block_table, slot_mapping, int(computed_context_lens[0])
            )
            blocks = *_NXDIS_OWN, *tables, *counts
        else:
            pad = self._pad_prompt if prefill else self._pad_decode
            arguments = pad(input_ids, attention_mask, position_ids)
        arguments = *arguments, self._slots(len(input_ids), seq_ids), *blocks
        logits = self.model(*(t.to(self.device) if isinstance(t, Tensor) else t for t in arguments))
        self.kv_cache_populated = True
        return CausalLMOutputWithPast(logits=logits)

    def _in_blocks(
        self,
        input_ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        table: Tensor,
        slots: Tensor,
        computed: int,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]:
        """The model's padded arguments, and slots and tables. A prompt is cut behind its cached prefix, whose mask and
        blocks are left."""
        if input_ids.shape[1] == 1:  # a step; NxDI takes prompts of one token for that, too
            arguments = self._pad_decode(input_ids, mask, positions)
            width = arguments[1].shape[1]
        else:
            rest = (tensor[:, computed:] for tensor in (input_ids, mask, positions))
            ids, _, positions = self._pad_prompt(*rest)
            neuron_config = self.neuron_config
            prefixes = [*(neuron_config.prefix_buckets or ()), neuron_config.max_length]
            width = bucket_of(computed, prefixes) if computed else 0
            arguments = ids, F.pad(mask[:, :computed], (0, width - computed)), positions
            slots = F.pad(slots, (0, ids.shape[1] - slots.shape[1]), value=-1)
        blocks = width // self.neuron_config.pa_block_size
        tables = F.pad(table, (0, blocks - table.shape[1])) if blocks else None
        return arguments, (slots, tables)

    def _slots(self, batch: int, seq_ids: Tensor | None) -> Tensor | slice:
        """A slice where the slots are 0..B-1, since indexing with a tensor copies the cache."""
        if seq_ids is None or torch.equal(seq_ids.cpu(), torch.arange(batch)):
            return slice(0, batch)
        return seq_ids.to(self.device)

    def _pad_prompt(self, input_ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = input_ids.shape[1]
        pad = (0, bucket_of(length, self.neuron_config.prompt_buckets()) - length)
        return F.pad(input_ids, pad, value=self.config.pad_token_id), F.pad(mask, pad), F.pad(positions, pad, value=1)

    def _pad_decode(self, input_ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = bucket_of(int(positions.max()) + 1, self.neuron_config.decode_buckets())
        return input_ids, F.pad(mask, (0, length - mask.shape[1])), positions


def with_draft(config: Any, draft: Any, model_cls: type[NeuronBaseModel]) -> Any:
    """The config as it is: the draft is a model beside this one."""
    return config


def _among_new(input_ids: Tensor) -> Tensor | None:
    """Which of the new tokens see each other, bool [1, 1, S, S]; None for one, which sees itself."""
    length = input_ids.shape[1]
    if length == 1:
        return None
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device).tril()


def bucket_of(length: int, buckets: list[int]) -> int:
    """The smallest bucket that holds `length`; at least 2, as one token would be a decoding step."""
    for bucket in buckets:
        if length <= bucket:
            return max(bucket, 2)
    raise ConfigError(f"length {length} exceeds the largest bucket {buckets[-1]}; add a larger bucket")


def _mask_from_positions(position_ids: Tensor, prefill: bool) -> Tensor:
    if prefill:
        return (position_ids >= torch.arange(position_ids.shape[1], device=position_ids.device)).to(torch.int64)
    return (torch.arange(int(position_ids.max()), device=position_ids.device) < position_ids).to(torch.int64)
