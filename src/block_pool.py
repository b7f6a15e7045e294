"""Which sequence holds which blocks of a paged cache, and which blocks sequences share.

Full blocks are found again by their tokens and all tokens ahead of them, as in vLLM's automatic prefix caching
(Kwon et al., arXiv:2309.06180). A block that no sequence holds keeps its content until it is needed: the one released
longest ago goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .errors import ConfigError


@dataclass
class BlockTable:
    """One sequence: its tokens so far, its blocks in order, and how many of them are full and known by their tokens."""

    tokens: list[int]
    blocks: list[int]
    sealed: int
    keys: list[bytes] = field(default_factory=list)


class BlockPool:
    """Blocks 0 to num_blocks - 1 of block_size tokens each. Sequences are named by the caller."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the first is taken next
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._tables: dict[int, BlockTable] = {}

    def open(self, name: int, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Blocks for a sequence that starts with `tokens`, in the place of the last one of this name; and how many of
        its tokens they hold already. At least one token is left to compute, which gives the logits."""
        self.close(name)
        shared, keys = self._shared(tokens)
        for block in shared:
            self._hold(block)
        table = self._tables[name] = BlockTable(list(tokens), list(shared), len(shared), keys)
        self._grow(name, table)
        return table.blocks, len(shared) * self.block_size

    def append(self, name: int, position: int, token: int) -> list[int]:
        """The sequence's blocks, with room for a token at `position`. Raises ConfigError where that is not its end:
        others may share what is ahead of it."""
        table = self._tables[name]
        if position != len(table.tokens):
            raise ConfigError(
                f"forward: position {position} does not follow the {len(table.tokens)} tokens of slot {name}; "
                "in blocks sequences only grow, give the prompt again"
            )
        table.tokens.append(token)
        self._grow(name, table)
        return table.blocks

    def blocks_of(self, name: int) -> list[int]:
        """The sequence's blocks, in order."""
        return list(self._tables[name].blocks)

    def seal(self, name: int) -> None:
        """The sequence's tokens are all in the cache now: its full blocks may be shared."""
        table, size = self._tables[name], self.block_size
        while (table.sealed + 1) * size <= len(table.tokens):
            start = table.sealed * size
            table.keys.append(_key(table.keys, table.tokens[start : start + size]))
            block, key = table.blocks[table.sealed], table.keys[-1]
            if key not in self._block_of_key:
                self._block_of_key[key], self._key_of_block[block] = block, key
            table.sealed += 1

    def close(self, name: int) -> None:
        """Gives the sequence's blocks back, if there is one of this name. What they hold can be found until it is
        needed, the beginning longest."""
        table = self._tables.pop(name, None)
        for block in reversed(table.blocks if table else ()):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def _shared(self, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        size, blocks, keys = self.block_size, [], []
        for start in range(0, (len(tokens) - 1) // size * size, size):
            key = _key(keys, tokens[start : start + size])
            if key not in self._block_of_key:
                break
            keys.append(key)
            blocks.append(self._block_of_key[key])
        return blocks, keys

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1

    def _grow(self, name: int, table: BlockTable) -> None:
        while len(table.blocks) * self.block_size < len(table.tokens):
            if not self._free:
                self.close(name)
                raise ConfigError(
                    f"all {len(self._holders)} blocks of the cache are in use; raise pa_num_blocks in the NeuronConfig"
                )
            block = next(iter(self._free))
            key = self._key_of_block.pop(block, None)
            if key is not None:
                del self._block_of_key[key]
            self._hold(block)
            table.blocks.append(block)


def _key(before: Sequence[bytes], tokens: Sequence[int]) -> bytes:
    """Names a block's tokens together with all ahead of it."""
    digest = hashlib.sha256(before[-1] if before else b"")
    digest.update(torch.tensor(tokens, dtype=torch.int64).numpy().tobytes())
    return digest.digest()
