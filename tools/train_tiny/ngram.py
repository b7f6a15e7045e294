"""Baseline: an interpolated Kneser-Ney n-gram model on the same tokens (Chen & Goodman 1998, sec. 2.7).

An n-gram is packed into one int64, 11 bits a token (vocabulary 2048), so that counting is sorting.
"""

import numpy as np

BITS = 11
VOCAB = 1 << BITS


def pack(stream, order):
    """int64 [len - order + 1]: the n-grams of a stream, the last token in the lowest bits."""
    length = len(stream) - order + 1
    keys = np.zeros(length, dtype=np.int64)
    for offset in range(order):
        keys = (keys << BITS) | stream[offset : offset + length].astype(np.int64)
    return keys


class Order:
    """Counts of one order: raw for the highest, continuation counts below (distinct left contexts)."""

    def __init__(self, keys):
        self.grams, self.counts = np.unique(keys, return_counts=True)
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        self.discount = once / max(once + 2 * twice, 1)
        self.contexts, starts = np.unique(self.grams >> BITS, return_index=True)
        self.totals = np.add.reduceat(self.counts, starts)
        self.followers = np.diff(np.append(starts, len(self.grams)))

    def probability(self, keys, lower):
        """P(last token | tokens before it) of packed n-grams, given the lower order's; unseen contexts defer to it."""
        counts = look_up(self.grams, self.counts, keys)
        totals = look_up(self.contexts, self.totals, keys >> BITS)
        followers = look_up(self.contexts, self.followers, keys >> BITS)
        seen = np.maximum(totals, 1)
        mixed = np.maximum(counts - self.discount, 0) / seen + self.discount * followers / seen * lower
        return np.where(totals > 0, mixed, lower)


def look_up(sorted_keys, values, keys):
    """values at keys, 0 where a key is not there."""
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[places] == keys, values[places], 0)


def build(stream, order):
    """Orders 1..order: the highest from the stream, each lower one from the distinct n-grams above it."""
    orders = [Order(pack(stream, order))]
    for size in range(order - 1, 0, -1):
        orders.insert(0, Order(orders[0].grams & ((1 << (BITS * size)) - 1)))
    return orders


def mean_loss(orders, stream):
    """Mean negative log-likelihood (nats per token) of a stream, after its first order-1 tokens."""
    top = len(orders)
    keys = pack(stream, top)
    probability = np.full(len(keys), 1.0 / VOCAB)
    for size, order in enumerate(orders, start=1):
        probability = order.probability(keys & ((1 << (BITS * size)) - 1), probability)
    return float(-np.log(probability).mean())


def best_successors(stream):
    """int64 [VOCAB]: the most frequent next token of each token, the bigram guess."""
    counts = np.bincount(pack(stream, 2), minlength=VOCAB * VOCAB).reshape(VOCAB, VOCAB)
    return counts.argmax(axis=1)
