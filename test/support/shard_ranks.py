"""A group of ranks in one process, a thread each, for functions that take their collectives as an argument."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class ShardRanks:
    """Runs a function on `size` ranks. reduce_dtype: in which a reduce-scatter adds up, one rank's part after the
    other as a ring does; None for that of its tensors."""

    def __init__(self, size, reduce_dtype=None):
        self.size, self.reduce_dtype = size, reduce_dtype
        self.calls = []
        self._barrier = threading.Barrier(size)
        self._slots = [None] * size
        self._own = threading.local()

    def run(self, function):
        """The results of function(group, shard_rank) by rank; shard_rank: int [1]."""

        def on(rank):
            self._own.rank = rank
            try:
                return function(self, torch.tensor([rank], dtype=torch.int32))
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))

    def _exchanged(self, kind, x):
        if self._own.rank == 0:
            self.calls.append((kind, x.dtype))
        self._slots[self._own.rank] = x
        self._barrier.wait()
        parts = list(self._slots)
        self._barrier.wait()
        return parts

    def gather(self, x, dim):
        return torch.cat(self._exchanged("gather", x), dim)

    def reduce_scatter(self, x, dim):
        parts = [part.chunk(self.size, dim)[self._own.rank] for part in self._exchanged("reduce_scatter", x)]
        total = parts[0].to(self.reduce_dtype or x.dtype)
        for part in parts[1:]:
            total = total + part.to(total.dtype)
        return total.to(x.dtype)
