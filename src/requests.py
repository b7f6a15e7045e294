"""What the model's forward takes: right-padded prompts from position 0 on, or one token behind each sequence.

NxDI runs anything else too, and gives other tokens without a word.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

_NOT_SUPPORTED = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states")


class RequestChecks:
    """Checks the calls of one model. Remembers how many positions each cache slot holds, [slots] of int64."""

    def __init__(self, neuron_config: Any, vocab_size: int, step_length: int = 1):
        """step_length: the most tokens by which a step can make a sequence longer."""
        self.neuron_config, self.vocab_size, self._step_length = neuron_config, vocab_size, step_length
        self.cached = torch.zeros(neuron_config.kv_cache_batch_size, dtype=torch.int64)

    def check(self, input_ids: Tensor | None, seq_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """position_ids and attention_mask [B, S] as the base model shall get them, the mask only where it needs one.

        input_ids [B, S]; seq_ids [B], the cache slots. Raises ConfigError for a call that cannot be answered right.
        """
        for name in _NOT_SUPPORTED:
            if inputs.get(name) is not None and inputs[name] is not False:
                raise ConfigError(f"forward: {name} is not supported; leave it out")
        if _holds_tokens(inputs.get("past_key_values")):
            raise ConfigError("forward: past_key_values is not supported; the KV cache lives in the model")
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if input_ids is None or positions is None or input_ids.ndim != 2 or positions.shape != input_ids.shape:
            raise ConfigError("forward needs input_ids and position_ids of one shape [batch, tokens]")
        self._check_slots(input_ids, seq_ids)
        sampling_params = inputs.get("sampling_params")
        if sampling_params is not None and len(sampling_params) != len(input_ids):
            raise ConfigError(f"forward: {len(sampling_params)} rows of sampling_params for {len(input_ids)} sequences")
        check = self._check_prompt if is_prompt(positions) else self._check_step
        return check(input_ids, seq_ids, positions, mask)

    def fill_batch(self, request: dict[str, Any]) -> dict[str, Any]:
        """A checked request with the rows that NxDI would fill in itself, behind its own.

        In a decoding step, they put a token behind each sequence left out, where its next token will go. Prompts of
        fewer rows than a batch of prompts start over: the other slots count as empty.
        """
        if is_prompt(request["position_ids"]):
            self._start_over(request["seq_ids"])
            return request
        rest = torch.ones(len(self.cached)).index_fill(0, request["seq_ids"].to(torch.int64), 0).nonzero().flatten()
        if not len(rest):
            return request
        positions, mask = request["position_ids"], request["attention_mask"]
        if mask is None:  # NxDI would infer one as long as the sequences left out
            mask = (torch.arange(int(positions.max())) < positions).to(torch.int64)
        last = self.neuron_config.max_length - self._step_length
        request = request | {"attention_mask": mask}
        filled = {name: _append_rows(value, len(rest), len(positions)) for name, value in request.items()}
        filled["seq_ids"][len(positions) :] = rest
        filled["position_ids"][len(positions) :, 0] = self.cached[rest].clamp(1, last)
        return filled

    def _start_over(self, seq_ids: Tensor) -> None:
        rows, at_once = len(seq_ids), self.neuron_config.ctx_batch_size
        if rows % at_once == 0:
            return
        if at_once < len(self.cached):
            raise ConfigError(f"{rows} prompts do not fill batches of ctx_batch_size {at_once}; set it to 1")
        rest = torch.ones(len(self.cached), dtype=torch.bool).index_fill(0, seq_ids.to(torch.int64), False)
        self.cached[rest] = 0

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
        neuron_config = self.neuron_config
        # In blocks, prompts run in chunks of max_context_length.
        limit = "max_length" if neuron_config.is_block_kv_layout else "max_context_length"
        length, longest = input_ids.shape[1], getattr(neuron_config, limit)
        if length > longest and not getattr(neuron_config, "allow_input_truncation", False):
            raise ConfigError(f"prompt of {length} tokens exceeds {limit} {longest}; raise it or shorten it")
        expected = torch.arange(length, device=positions.device)
        if mask is None:  # what NxDI infers, which leaves a prompt of one token empty
            mask = (positions >= expected).to(torch.int64)
        check_right_padded(mask, input_ids.shape)
        if ((positions != expected) & mask.bool()).any():
            raise ConfigError("forward: the positions of a prompt must be 0, 1, 2, ...; send prompts and steps apart")
        check_token_ids(input_ids[mask.bool()].tolist(), self.vocab_size)
        self.cached[seq_ids] = mask.to(torch.int64).sum(-1).cpu()
        # NxDI's own position for padding; one below 0 would make it take the prompt for a decoding step.
        return {"position_ids": torch.where(mask.bool(), positions, 1), "attention_mask": mask}

    def _check_step(
        self, input_ids: Tensor, seq_ids: Tensor, positions: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        if positions.shape[1] != 1:
            raise ConfigError("forward: a prompt must start at position 0, and a decoding step takes one token")
        check_token_ids(input_ids.flatten().tolist(), self.vocab_size)
        masked = {}
        if mask is not None:
            lengths = mask.to(torch.int64).sum(-1, keepdim=True)
            check_right_padded(mask, mask.shape)
            # NxDI's generation adapter puts the first token behind a one-token prompt, padded, at position 2.
            positions = torch.where((lengths == 1) & (positions == 2), 1, positions)
            if (lengths != positions).any():
                raise ConfigError("forward: attention_mask and position_ids differ in the number of cached tokens")
            masked["attention_mask"] = mask
        self._check_positions(seq_ids, positions[:, 0].cpu())
        return {"position_ids": positions} | masked

    def _check_positions(self, seq_ids: Tensor, positions: Tensor) -> None:
        limit, length = self.neuron_config.max_length, self._step_length
        if int(positions.max()) + length > limit:  # NxDI moves drafted tokens beyond it back, over other positions
            raise ConfigError(f"the sequence reached seq_len {limit}; raise seq_len in the NeuronConfig")
        for slot, position, cached in zip(
            seq_ids.tolist(), positions.tolist(), self.cached[seq_ids].tolist(), strict=True
        ):
            if not 0 < position <= cached:
                raise ConfigError(f"forward: position {position} does not follow the {cached} cached in slot {slot}")
        self.cached[seq_ids] = positions.to(torch.int64) + length


def is_prompt(position_ids: Tensor) -> bool:
    """Whether NxDI takes a call for prompts, not for a decoding step."""
    return bool((position_ids == 0).any())


def _holds_tokens(past_key_values: Any) -> bool:
    """transformers makes an empty cache for every generation."""
    if past_key_values is None:
        return False
    return bool(getattr(past_key_values, "get_seq_length", past_key_values.__len__)())


def take_rows(value: Any, rows: Tensor, batch: int | None = None) -> Any:
    """The rows of a tensor [batch, ...], or of each tensor of a list; anything else as it is. batch: len(rows) if not
    given."""
    if isinstance(value, list | tuple):
        return type(value)(take_rows(item, rows, batch) for item in value)
    is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == (batch or len(rows))
    return value[rows] if is_batch else value


def _append_rows(value: Any, rows: int, batch: int) -> Any:
    """`rows` copies of the first row behind a tensor [batch, ...]; anything else as it is."""
    is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
    return torch.cat([value, value[:1].expand(rows, *value.shape[1:])]) if is_batch else value


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
