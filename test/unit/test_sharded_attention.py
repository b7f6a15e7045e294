"""Attention over a cache that is split by sequence, against attention over the whole one: the functions alone."""

import pytest
import torch
from nxdi_deepseek import mla
from nxdi_deepseek.sharded_attention import by_rank, gathered_rows, held_rows, own_rows, owned_place, sharded_attention
from support.shard_ranks import ShardRanks

# The tolerance asked for. Weighted sums of latents of size 1: 50 roundings of float32.
TOLERANCE = 5e-6
SCALE = 0.07
GATHER, SCATTER = ("gather", torch.float32), ("reduce_scatter", torch.float32)


def make(lengths, new, heads=4, nope=24, rope=16, v=20, rank=32, seed=0, dtype=torch.float64):
    """Queries, weights, cache with garbage behind each sequence's end, new keys; float64 unless asked."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, rows = len(lengths), max(lengths)
    return {
        "q": (randn(batch, heads, new, nope), randn(batch, heads, new, rope)),
        "w": (randn(heads, nope, rank) / nope**0.5, randn(heads, v, rank) / rank**0.5),
        "cached": (randn(batch, 1, rows, rope), randn(batch, 1, rows, rank)),
        "active": (randn(batch, 1, new, rope), randn(batch, 1, new, rank)),
        "lengths": torch.tensor(lengths),
    }


def active_mask(new):
    return None if new == 1 else torch.ones(new, new, dtype=torch.bool).tril()[None, None]


def unsharded(t):
    rows, new = t["cached"][0].shape[2], t["q"][0].shape[2]
    mask = (torch.arange(rows) < t["lengths"][:, None])[:, None, None]
    return mla.absorbed_attention(*t["q"], *t["w"], t["cached"], t["active"], mask, active_mask(new), SCALE)


def exact(t):
    """In float64 throughout, which mla's softmax is not."""
    (q_nope, q_pe), (w_uk, w_uv) = t["q"], t["w"]
    k_pe, latent = (torch.cat(pair, dim=2) for pair in zip(t["cached"], t["active"], strict=True))
    rows, new = t["cached"][0].shape[2], q_nope.shape[2]
    cached = (torch.arange(rows) < t["lengths"][:, None])[:, None, None].expand(-1, 1, new, -1)
    causal = torch.ones(new, new, dtype=torch.bool).tril().expand(len(cached), 1, -1, -1)
    scores = ((q_nope @ w_uk) @ latent.mT + q_pe @ k_pe.mT) * SCALE
    scores = scores.masked_fill(~torch.cat((cached, causal), dim=-1), float("-inf"))
    return scores.softmax(-1) @ latent @ w_uv.mT


def rank_cache(t, shards, shard_rank):
    """A rank's rows, and those that count."""
    cached = tuple(own_rows(x, shards, shard_rank) for x in t["cached"])
    held = held_rows(t["lengths"], shards, shard_rank)
    return cached, (torch.arange(cached[0].shape[2]) < held[:, None])[:, None, None]


def sharded(t, ranks):
    """All heads' output, of the ranks' heads side by side."""
    heads = t["q"][0].shape[1] // ranks.size

    def on_rank(group, shard_rank):
        own = slice(shard_rank.item() * heads, (shard_rank.item() + 1) * heads)
        cached, mask = rank_cache(t, ranks.size, shard_rank)
        q, w = [x[:, own] for x in t["q"]], [x[own] for x in t["w"]]
        new = q[0].shape[2]
        return sharded_attention(*q, *w, cached, t["active"], mask, active_mask(new), SCALE, group, shard_rank)

    return torch.cat(ranks.run(on_rank), dim=1)


def of_dtype(t, dtype):
    return {name: value if name == "lengths" else tuple(x.to(dtype) for x in value) for name, value in t.items()}


@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4, 16])
def test_shards_equal_the_whole_cache(shards, new):
    """Sequences of a few rows, of fewer than ranks, of none, and of a number that the ranks do not divide."""
    t = of_dtype(make([1, 0, 3, 17, 64, 63, 97], new, heads=16), torch.float32)
    ranks = ShardRanks(shards)
    out = sharded(t, ranks)
    torch.testing.assert_close(out, unsharded(t), rtol=0, atol=TOLERANCE)
    assert ranks.calls == [GATHER, GATHER, SCATTER]


@pytest.mark.parametrize("new", [1, 4])
def test_shards_of_a_pool_that_all_sequences_read(new):
    """Batch 1 in the cache, a mask for each sequence."""
    t = of_dtype(make([40], new, heads=8), torch.float32)
    t["q"] = tuple(torch.cat((x, 2 * x)) for x in t["q"])
    t["active"] = tuple(torch.cat((x, -x)) for x in t["active"])
    t["lengths"] = torch.tensor([40, 9])
    torch.testing.assert_close(sharded(t, ShardRanks(4)), unsharded(t), rtol=0, atol=TOLERANCE)


def test_rows_that_do_not_count_change_nothing():
    t = of_dtype(make([5, 0, 30], 2), torch.float32)
    behind = (torch.arange(30) >= t["lengths"][:, None])[:, None, :, None]
    other = t | {"cached": tuple(torch.where(behind, 1e4, x) for x in t["cached"])}
    assert torch.equal(sharded(t, ShardRanks(4)), sharded(other, ShardRanks(4)))


@pytest.fixture(scope="module")
def bfloat16_errors():
    """The worst sequence's error relative to float64, by what ran."""
    found = {}
    t = of_dtype(make([63, 2100], 2, heads=64, nope=32, rope=16, v=32, rank=128), torch.bfloat16)
    truth = exact(of_dtype(t, torch.float64))
    for name, out in {
        "unsharded": unsharded(t),
        "sharded": sharded(t, ShardRanks(64)),
        "reduced in bfloat16": sharded(t, ShardRanks(64, torch.bfloat16)),
    }.items():
        error = (out.double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
        found[name] = error.max().item()
    print(found)
    return found


def test_bfloat16_shards_err_as_little_as_the_whole_cache(bfloat16_errors):
    assert bfloat16_errors["sharded"] <= 1.2 * bfloat16_errors["unsharded"]


def test_a_reduction_in_bfloat16_would_not(bfloat16_errors):
    assert bfloat16_errors["reduced in bfloat16"] > 1.2 * bfloat16_errors["unsharded"]


@pytest.mark.parametrize("shards", [1, 4, 16])
def test_each_position_has_one_owner(shards):
    places = torch.arange(50)[None]
    owners = torch.stack([owned_place(places, shards, torch.tensor([r]), otherwise=99) for r in range(shards)])
    assert ((owners != 99).sum(0) == 1).all()
    for rank in range(shards):
        held = [int((owners[rank, 0, :n] != 99).sum()) for n in range(51)]
        assert held == held_rows(torch.arange(51), shards, torch.tensor([rank])).tolist()


def test_gathered_prefix_is_rank_by_rank_with_its_mask():
    """Behind a gather, the rows under the mask are those of the first positions."""
    x = torch.arange(24.0)[None, None, :, None]
    mask = torch.arange(24) < torch.tensor([[10], [0]])

    def on_rank(group, shard_rank):
        return gathered_rows((own_rows(x, 4, shard_rank), own_rows(-x, 4, shard_rank)), group)

    for k_pe, latent in ShardRanks(4).run(on_rank):
        assert torch.equal(k_pe, -latent)
        for row, length in zip(by_rank(mask, 4), (10, 0), strict=True):
            assert sorted(k_pe[0, 0, row, 0].tolist()) == list(range(length))
