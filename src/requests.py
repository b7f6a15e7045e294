"""What the model's forward takes: right-padded prompts from position 0 on, or one token behind each sequence.

NxDI runs anything else too, and gives other tokens without a word.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

_NOT_SUPPORTED = ("inputs_embeds", "past_key_values", "labels", "output_attentions", "output_hidden_states")


class RequestChecks:
    """Checks the calls of one model. Remembers how many positions each cache slot holds, [slots] of int64."""

    def __init__(self, neuron_config: Any, vocab_size: int):
        self.neuron_config, self.vocab_size = neuron_config, vocab_size
        self.cached = torch.zeros(neuron_config.kv_cache_batch_size, dtype=torch.int64)

    def check(self, input_ids: Tensor | None, seq_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """position_ids and attention_mask [B, S] as the base model shall get them, the mask only where it needs one.

        input_ids [B, S]; seq_ids [B], the cache slots. Raises ConfigError for a call that cannot be answered right.
        """
        for name in _NOT_SUPPORTED:
            if inputs.get(name) is not None and inputs[name] is not False:
                raise ConfigError(f"forward: {name} is not supported; leave it out")
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if input_ids is None or positions is None or input_ids.ndim != 2 or positions.shape != input_ids.shape:
            raise ConfigError("forward needs input_ids and position_ids of one shape [batch, tokens]")
        self._check_slots(input_ids, seq_ids)
        sampling_params = inputs.get("sampling_params")
        if sampling_params is not None and len(sampling_params) != len(input_ids):
            raise ConfigError(f"forward: {len(sampling_params)} rows of sampling_params for {len(input_ids)} sequences")
        if not (positions == 0).any():
            return self._check_step(input_ids, seq_ids, positions, mask)
        return self._check_prompt(input_ids, seq_ids, positions, mask)

    def _check_slots(self, input_ids: Tensor, seq_ids: Tensor) -> None:
        batch, slots = len(input_ids), len(self.cached)
        if batch > slots:
            raise ConfigError(
                f"batch of {batch} sequences exceeds batch_size {slots} of the NeuronConfig; raise it or send fewer"
            )
        if len(seq_ids) != batch:
            raise ConfigError(f"forward: {len(seq_ids)} seq_ids for {batch} sequences; give one for each")
        for slot in seq_ids.tolist():
            if not 0 <= slot < slots:
                raise ConfigError(f"slot {slot} of {slots} is asked for; raise batch_size in the NeuronConfig")
        if len(seq_ids.unique()) < batch:
            raise ConfigError(f"seq_ids {seq_ids.tolist()} name a slot twice; give each sequence its own")

    def _check_prompt(
        self, input_ids: Tensor, seq_ids: Tensor, positions: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        length, longest = input_ids.shape[1], self.neuron_config.max_context_length
        if length > longest and not getattr(self.neuron_config, "allow_input_truncation", False):
            raise ConfigError(f"prompt of {length} tokens exceeds max_context_length {longest}; raise it or shorten it")
        expected = torch.arange(length, device=positions.device)
        if mask is None:  # what NxDI infers, which leaves a prompt of one token empty
            mask = (positions >= expected).to(torch.int64)
        check_right_padded(mask, input_ids.shape)
        if ((positions != expected) & mask.bool()).any():
            raise ConfigError("forward: the positions of a prompt must be 0, 1, 2, ...; send prompts and steps apart")
        check_token_ids(input_ids[mask.bool()].tolist(), self.vocab_size)
        self.cached[seq_ids] = mask.long().sum(-1).cpu()
        return {"position_ids": positions, "attention_mask": mask}

    def _check_step(
        self, input_ids: Tensor, seq_ids: Tensor, positions: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        if positions.shape[1] != 1:
            raise ConfigError("forward: a prompt must start at position 0, and a decoding step takes one token")
        check_token_ids(input_ids.flatten().tolist(), self.vocab_size)
        masked = {}
        if mask is not None:
            lengths = mask.long().sum(-1, keepdim=True)
            check_right_padded(mask, mask.shape)
            # NxDI's generation adapter puts the first token behind a one-token prompt, padded, at position 2.
            positions = torch.where((lengths == 1) & (positions == 2), 1, positions)
            if (lengths != positions).any():
                raise ConfigError("forward: attention_mask and position_ids differ in the number of cached tokens")
            masked["attention_mask"] = mask
        self._check_positions(seq_ids, positions[:, 0].cpu())
        return {"position_ids": positions} | masked

    def _check_positions(self, seq_ids: Tensor, positions: Tensor) -> None:
        limit = self.neuron_config.max_length
        if int(positions.max()) >= limit:
            raise ConfigError(f"the sequence reached seq_len {limit}; raise seq_len in the NeuronConfig")
        for slot, position, cached in zip(
            seq_ids.tolist(), positions.tolist(), self.cached[seq_ids].tolist(), strict=True
        ):
            if not 0 < position <= cached:
                raise ConfigError(f"forward: position {position} does not follow the {cached} cached in slot {slot}")
        self.cached[seq_ids] = positions.long() + 1


def check_right_padded(mask: Tensor, shape: torch.Size) -> None:
    """mask: 1 for tokens and 0 for padding, of `shape` [B, S]. Raises ConfigError unless each row is tokens, then
    padding."""
    if mask.shape != shape:
        raise ConfigError(f"attention_mask of shape {list(mask.shape)} for input_ids of shape {list(shape)}")
    tokens = mask.bool()
    if tokens.shape[1] == 0 or not tokens.any(-1).all():
        raise ConfigError("empty prompt; give at least one token")
    if (tokens[:, 1:] & ~tokens[:, :-1]).any():
        kind = (
            "has holes; leave out what is masked" if tokens[:, 0].all() else "is padded on the left; pad on the right"
        )
        raise ConfigError(f"attention_mask {kind} (tokenizer.padding_side='right')")


def check_token_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raises ConfigError for an id that the embedding does not have."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"token id {token} is outside the vocabulary of {vocab_size}")
