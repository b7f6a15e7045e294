"""Every member of the family equals its own judge; a test module of either backend runs it by importing all of it."""

import pytest
import torch
from nxdi_deepseek import backend

from support import members, models, nxdi
from support.dequantized import parts_of, write_dequantized
from support.members import MEMBERS, SEEDS, load_goldens
from support.models import V3, Session, load_model, random_prompts

TOLERANCE = 1e-4  # as in parity_suite


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    return members.released(tmp_path_factory.getbasetemp())


def fed(model, prompts, tokens):
    """The logits [B, T, V] after each prompt and each of `tokens` [B, T] but the last."""
    session = Session(model)
    logits = [session.prefill(prompts)]
    logits += [session.decode(step) for step in tokens[:, :-1].T.tolist()]
    return torch.stack(logits, dim=1)


def assert_equals_judge(folder, logits):
    """Within the tolerance, and the judge's tokens wherever its two best logits are further apart than that."""
    _, tokens, goldens = load_goldens(folder)
    torch.testing.assert_close(logits, goldens, rtol=0, atol=TOLERANCE)
    first, second = goldens.topk(2, dim=-1).values.unbind(-1)
    clear = first - second > 2 * TOLERANCE
    assert clear.float().mean() > 0.95
    assert torch.equal(logits.argmax(-1)[clear], tokens[clear])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MEMBERS)
def test_member_equals_its_judge(released, name, seed):
    folder = released[name, seed]
    prompts, tokens, _ = load_goldens(folder)
    assert_equals_judge(folder, fed(load_model(folder, batch_size=len(prompts)), prompts, tokens))


@pytest.mark.parametrize("form", ["fp8", "fp8-block"])
@pytest.mark.parametrize("name", MEMBERS)
def test_fp8_experts_equal_the_member_on_the_same_codes(tmp_path, name, form):
    members.write_member(tmp_path, name, seed=0)
    judge = write_dequantized(tmp_path / "dequantized", tmp_path, parts_of(tmp_path, weights=form))
    prompts = random_prompts((9, 1))
    tokens = torch.randint(V3["vocab_size"], (2, 4), generator=torch.Generator().manual_seed(0))
    logits = fed(load_model(tmp_path, batch_size=2, weights=form), prompts, tokens)
    torch.testing.assert_close(logits, fed(load_model(judge, batch_size=2), prompts, tokens), rtol=0, atol=TOLERANCE)


def fed_on_rank(folders, tp_degree):
    """Runs in a process of its own."""
    logits = []
    for folder in folders:
        prompts, tokens, _ = load_goldens(folder)
        logits.append(fed(load_model(folder, batch_size=len(prompts), tp_degree=tp_degree), prompts, tokens))
    return logits


def test_two_ranks_equal_the_judge(released):
    folders = [released[name, 0] for name in MEMBERS]
    initialize = nxdi.init_cpu_parallel if backend.NAME == "nxdi" else models.init_embedded
    for ranks in nxdi.run_parallel(fed_on_rank, 2, folders, 2, initialize=initialize):
        for folder, logits in zip(folders, ranks, strict=True):
            assert_equals_judge(folder, logits)
