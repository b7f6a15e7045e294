"""The MTP layer as the draft of NxDI's own fused model, in CPU mode: against a reference of its own."""

import pytest
from support import nxdi

nxdi.require_nxdi()

from support.fused_cpu import FusedModule  # noqa: E402
from support.models import random_prompts  # noqa: E402
from support.mtp_drafts import ACCEPTANCE, FAULTS, PROMPT_LENGTHS, write_drafted  # noqa: E402
from support.mtp_reference import ReferenceMTP  # noqa: E402
from support.mtp_suite import acceptance, assert_right  # noqa: E402

PROMPTS = random_prompts(PROMPT_LENGTHS)
STEPS = 8


@pytest.fixture(scope="module", params=ACCEPTANCE)
def drafted(request, tmp_path_factory):
    """(kind, folder, reference)"""
    folder = write_drafted(tmp_path_factory.mktemp("drafted"), request.param)
    return request.param, folder, ReferenceMTP(folder)


def run(folder, length, tp_degree=1, fault=None):
    """Tokens and drafts on this rank, of uneven rows."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        neuron = {"batch_size": len(PROMPTS), "seq_len": 64, "max_context_length": 24, "tp_degree": tp_degree}
        fused = FusedModule(folder, monkeypatch, length, **neuron)
        if fault:
            fault(monkeypatch, fused.module.target_model)
        return fused.run(PROMPTS, STEPS)


@pytest.mark.parametrize("tp_degree", [1, 4])
@pytest.mark.parametrize("length", [2, 3])
def test_drafts_equal_the_reference_and_tokens_hugging_face(drafted, length, tp_degree):
    kind, folder, reference = drafted
    ranks = [run(folder, length)]
    if tp_degree > 1:
        ranks = nxdi.run_parallel(run, tp_degree, folder, length, tp_degree)
    for rows, drafts in ranks:
        assert_right(reference, PROMPTS, rows, drafts)
        least, most = ACCEPTANCE[kind]
        assert least <= acceptance(PROMPTS, rows, STEPS, length) <= most


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    folder = write_drafted(tmp_path, "half")
    rows, drafts = run(folder, 2, fault=fault)
    with pytest.raises(AssertionError):
        assert_right(ReferenceMTP(folder), PROMPTS, rows, drafts)
