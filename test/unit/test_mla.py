"""Both forms of latent attention against torch's scaled_dot_product_attention on explicit keys and values."""

import pytest
import torch
from nxdi_deepseek import mla
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

B, N, L, D, P, V, R = 2, 3, 7, 12, 8, 20, 16
SCALE = 0.17


@pytest.fixture(params=[0, 1])
def tensors(request):
    generator = torch.Generator().manual_seed(request.param)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    def make(queries):
        return {
            "q_nope": randn(B, N, queries, D),
            "q_pe": randn(B, N, queries, P),
            "w_uk": randn(N, D, R),
            "w_uv": randn(N, V, R),
            "k_pe": randn(B, 1, L + queries, P),
            "latent": randn(B, 1, L + queries, R),
        }

    return make


def explicit(t, mask):
    """The definition: keys and values per head, 1 softmax over all of them."""
    keys = torch.cat((t["latent"] @ t["w_uk"].transpose(-1, -2), t["k_pe"].expand(-1, N, -1, -1)), dim=-1)
    values = t["latent"] @ t["w_uv"].transpose(-1, -2)
    queries = torch.cat((t["q_nope"], t["q_pe"]), dim=-1)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=SCALE)


def absorbed(t, cached_mask, active_mask):
    cached = t["k_pe"][:, :, :L], t["latent"][:, :, :L]
    active = t["k_pe"][:, :, L:], t["latent"][:, :, L:]
    weights = t["w_uk"], t["w_uv"]
    return mla.absorbed_attention(t["q_nope"], t["q_pe"], *weights, cached, active, cached_mask, active_mask, SCALE)


def test_absorbed_one_token_sees_its_own_row_of_the_cache(tensors):
    t = tensors(queries=1)
    cached_mask = torch.arange(L) < torch.tensor([3, 6])[:, None, None, None]
    mask = torch.cat((cached_mask, torch.ones(B, 1, 1, 1, dtype=torch.bool)), dim=-1)
    torch.testing.assert_close(absorbed(t, cached_mask, None), explicit(t, mask))


def test_absorbed_several_tokens_see_each_other_through_the_active_mask(tensors):
    t = tensors(queries=4)
    cached_mask = (torch.arange(L) < torch.tensor([2, 7])[:, None, None, None]).expand(-1, 1, 4, -1)
    active_mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask = torch.cat((cached_mask, active_mask.expand(B, -1, -1, -1)), dim=-1)
    torch.testing.assert_close(absorbed(t, cached_mask, active_mask), explicit(t, mask))


@pytest.mark.parametrize("block", [512, 4, 3])
def test_expanded_equals_the_definition(tensors, monkeypatch, block):
    """In one block of queries, in blocks that divide the prompt, and in blocks that do not."""
    monkeypatch.setattr(mla, "QUERY_BLOCK", block)
    t = tensors(queries=8)
    t["k_pe"], t["latent"] = t["k_pe"][:, :, :8], t["latent"][:, :, :8]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    k_nope = t["latent"] @ t["w_uk"].transpose(-1, -2)
    v = t["latent"] @ t["w_uv"].transpose(-1, -2)
    out = mla.expanded_attention(t["q_nope"], t["q_pe"], k_nope, t["k_pe"], v, SCALE)
    torch.testing.assert_close(out, explicit(t, mask))


def test_long_prompts_get_at_most_32_blocks(monkeypatch):
    monkeypatch.setattr(mla, "QUERY_BLOCK", 1)
    q, k_pe = torch.randn(1, 1, 70, 2), torch.randn(1, 1, 70, 2)
    with FlopCounterMode(display=False) as counter:
        mla.expanded_attention(q, q, q, k_pe, q, SCALE)
    rows = 3  # ceil(70 / 32)
    seen = sum(rows * end for end in range(rows, 70, rows)) + 1 * 70
    assert counter.get_total_flops() == 2 * seen * (4 + 2)


def test_a_row_that_sees_nothing_is_finite(tensors):
    t = tensors(queries=2)
    blind = torch.zeros(1, 1, 2, L, dtype=torch.bool)
    assert absorbed(t, blind, torch.zeros(1, 1, 2, 2, dtype=torch.bool)).isfinite().all()
