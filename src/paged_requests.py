"""Turns a checked request into the calls that a paged cache takes: prompts one by one, in chunks; steps with blocks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .block_pool import BlockPool
from .errors import ConfigError
from .requests import is_prompt, take_rows

# What whoever keeps tables of its own passes: vLLM's plugin does.
TABLE_FIELDS = ("block_table", "slot_mapping", "full_context_lens", "computed_context_lens")


class PagedRequests:
    """The calls of one model. Where the caller has no tables of its own, it keeps them: a sequence per cache slot.

    computed, reused: tokens of prompts that were computed, and that were found in the cache, since the model was made.
    """

    def __init__(self, neuron_config: Any):
        self.neuron_config = neuron_config
        self.size: int = neuron_config.pa_block_size
        self.pool = BlockPool(neuron_config.pa_num_blocks, self.size)
        self.computed, self.reused = 0, 0
        self._own_tables: bool | None = None  # not known before the first call

    def run(self, call: Callable[..., Any], request: dict[str, Any]) -> Any:
        """What `call` (the base class's forward) returns for a checked request, with a row for each of its sequences.
        request: input_ids, seq_ids, position_ids, attention_mask, and the caller's tables, if it has any."""
        own = all(request.get(name) is None for name in TABLE_FIELDS)
        if self._own_tables not in (None, own):
            raise ConfigError("forward: block_table is given in some calls only; give it in all, or in none")
        self._own_tables = own
        if own:
            return self._run_with_own_tables(call, request)
        self._check_tables(request)
        return self._run(call, request, request["block_table"], request["computed_context_lens"].flatten().tolist())

    def _check_tables(self, request: dict[str, Any]) -> None:
        """Raises ConfigError for the caller's tables that NxDI would follow to other blocks, or not at all."""
        missing = [name for name in TABLE_FIELDS if request.get(name) is None]
        if missing:
            raise ConfigError(f"forward: {', '.join(missing)} missing; give all of {', '.join(TABLE_FIELDS)} or none")
        blocks, tables = self.neuron_config.pa_num_blocks, request["block_table"]
        if int(tables.min()) < 0 or int(tables.max()) >= blocks:
            raise ConfigError(f"forward: block_table names blocks outside 0 to {blocks - 1}, pa_num_blocks {blocks}")
        if is_prompt(request["position_ids"]):
            lengths, computed = request["attention_mask"].sum(-1), request["computed_context_lens"].flatten()
            if bool(((computed < 0) | (computed >= lengths)).any()):
                raise ConfigError("forward: computed_context_lens must leave a token of each prompt to compute")

    def _run_with_own_tables(self, call: Callable[..., Any], request: dict[str, Any]) -> Any:
        """A prompt's blocks are opened when it is its turn, so that it finds those of the prompts ahead of it."""
        names = request["seq_ids"].tolist()
        if not is_prompt(request["position_ids"]):
            steps = zip(names, request["position_ids"][:, 0].tolist(), request["input_ids"][:, 0].tolist(), strict=True)
            tables = [self.pool.append(*step) for step in steps]
            output = self._run(call, request, self._padded(tables), None)
            for name in names:
                self.pool.seal(name)
            return output
        outputs = []
        for row, (name, length) in enumerate(zip(names, request["attention_mask"].sum(-1).tolist(), strict=True)):
            table, computed = self.pool.open(name, request["input_ids"][row, :length].tolist())
            one = {key: take_rows(value, torch.tensor([row]), len(names)) for key, value in request.items()}
            outputs.append(self._run(call, one, self._padded([table]), [computed]))
            self.pool.seal(name)
        return _joined(outputs)

    def _run(
        self, call: Callable[..., Any], request: dict[str, Any], tables: Tensor, computed: list[int] | None
    ) -> Any:
        if not is_prompt(request["position_ids"]):
            return call(**self._step(request, tables))
        outputs = []
        for row in range(len(tables)):
            one = {key: take_rows(value, torch.tensor([row]), len(tables)) for key, value in request.items()}
            for part in self._chunks(one, tables[row : row + 1], computed[row]):
                output = call(**part)
            outputs.append(output)
        return _joined(outputs)

    def _chunks(self, request: dict[str, Any], table: Tensor, computed: int) -> Iterator[dict[str, Any]]:
        """The calls of one prompt. Each gets the tokens up to its chunk's end, as NxDI wants it, and computes those
        from `computed` on."""
        length = int(request["attention_mask"].sum())
        self.computed += length - computed
        self.reused += computed
        if length == 1:  # NxDI takes it for a step
            zero = torch.zeros(1, 1, dtype=torch.int64)
            yield self._step(request | {"input_ids": request["input_ids"][:, :1], "position_ids": zero}, table)
        positions = torch.arange(length)
        while computed < length > 1:
            end = min(computed + self.neuron_config.max_context_length, length)
            yield request | {
                "input_ids": request["input_ids"][:, :end],
                "position_ids": positions[None, :end],
                "attention_mask": torch.ones(1, end, dtype=torch.int64),
                "seq_ids": torch.zeros(1, dtype=torch.int64),
                "block_table": table[:, : -(-end // self.size)],
                "slot_mapping": self._slots(table, positions[None, computed:end]),
                "full_context_lens": torch.tensor([[end]]),
                "computed_context_lens": torch.tensor([[computed]]),
            }
            computed = end

    def _step(self, request: dict[str, Any], tables: Tensor) -> dict[str, Any]:
        positions = request["position_ids"]
        width = max(int(positions.max()), 1)
        return request | {
            "attention_mask": (torch.arange(width) < positions).to(torch.int64),
            "seq_ids": torch.arange(len(positions)),
            "block_table": tables,
            "slot_mapping": self._slots(tables, positions),
            "full_context_lens": positions + 1,
            "computed_context_lens": positions,
        }

    def _slots(self, tables: Tensor, positions: Tensor) -> Tensor:
        """Where the tokens at these positions [B, S] go."""
        return tables.gather(1, positions // self.size) * self.size + positions % self.size

    @staticmethod
    def _padded(tables: list[list[int]]) -> Tensor:
        width = max(map(len, tables))
        return torch.tensor([table + [0] * (width - len(table)) for table in tables])


def _joined(outputs: list[Any]) -> Any:
    """One output with the rows of all."""
    first, *rest = outputs
    if not rest:
        return first
    for name in dict(first) | vars(first):
        setattr(first, name, _rows_of_all([getattr(output, name) for output in outputs]))
    return first


def _rows_of_all(values: list[Any]) -> Any:
    """Tensors one behind the other, those of lists place by place; of anything else the first."""
    first = values[0]
    if isinstance(first, list | tuple):
        return type(first)(_rows_of_all(list(items)) for items in zip(*values, strict=True))
    return torch.cat(values) if isinstance(first, Tensor) and first.ndim else first
