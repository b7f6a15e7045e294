"""The MTP layer as a draft on the embedded runtime: against a reference of its own, and what generate() makes of it."""

import json
import re
import warnings

import pytest
import torch
from nxdi_deepseek import backend
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.commands.generate import right_pad
from nxdi_deepseek.embedded.draft_and_verify import DraftAndVerify
from nxdi_deepseek.errors import CheckpointError, ConfigError
from nxdi_deepseek.modeling_deepseek import DeepseekV3InferenceConfig
from nxdi_deepseek.tiny_model import TINY_MODEL_DIR, load_goldens
from nxdi_deepseek.token_choice import TokenChoice
from support import nxdi
from support.damage import drop, replace
from support.members import GLM
from support.models import CONFIGS, init_embedded, load_config, load_model, make_config, random_prompts
from support.mtp_drafts import ACCEPTANCE, DRAFTED, FAULTS, MTP_LAYER, PROMPT_LENGTHS, write_drafted
from support.mtp_reference import ReferenceMTP
from support.mtp_suite import acceptance, assert_right
from transformers import set_seed

PROMPTS = random_prompts(PROMPT_LENGTHS)
NEW_TOKENS = 24
GREEDY = TokenChoice([], do_sample=False)


@pytest.fixture(scope="module", params=ACCEPTANCE)
def drafted(request, tmp_path_factory):
    """(kind, folder, reference)"""
    folder = write_drafted(tmp_path_factory.mktemp("drafted"), request.param)
    return request.param, folder, ReferenceMTP(folder)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = write_drafted(tmp_path_factory.mktemp("half"), "half")
    return folder, ReferenceMTP(folder)


def load(folder, length=2, **neuron):
    neuron = {"batch_size": len(PROMPTS)} | neuron
    return load_model(folder, enable_eagle_speculation=True, speculation_length=length, **neuron)


def adapter_of(model):
    adapter = backend.HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None
    adapter.generation_config.pad_token_id = 0
    return adapter


class Recording(DraftAndVerify):
    """Notes what each step drafted, behind which tokens, and the hidden states that its first drafts are from."""

    def __init__(self, model):
        super().__init__(model, GREEDY)
        self.drafts = []

    def _drafts(self, known):
        tokens, probabilities = super()._drafts(known)
        self.drafts.append(([row.tolist() for row in known], tokens.tolist(), self._hidden))
        return tokens, probabilities


def run(model, prompts, steps):
    """The tokens of each row after `steps` steps, and the drafts that were made of them."""
    engine, (ids, mask) = Recording(model), right_pad(prompts, model.config)
    first = engine.start(ids, mask, [torch.tensor(prompt) for prompt in prompts])
    rows = [[*prompt, token] for prompt, token in zip(prompts, first.tolist(), strict=True)]
    for _ in range(steps):
        tokens, accepted = engine.step([torch.tensor(row) for row in rows], torch.zeros(len(rows), dtype=torch.bool))
        for row, found, count in zip(rows, tokens.tolist(), accepted.tolist(), strict=True):
            row += found[: count + 1]
    return rows, engine.drafts


@pytest.mark.parametrize("length", [2, 3])
def test_drafts_equal_the_reference_and_tokens_hugging_face(drafted, length):
    kind, folder, reference = drafted
    rows, drafts = run(load(folder, length), PROMPTS, 8)
    assert_right(reference, PROMPTS, rows, drafts)
    least, most = ACCEPTANCE[kind]
    assert least <= acceptance(PROMPTS, rows, 8, length) <= most


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(half, fault, monkeypatch):
    folder, reference = half
    model = load(folder)
    fault(monkeypatch, model.model)
    rows, drafts = run(model, PROMPTS, 6)
    with pytest.raises(AssertionError):
        assert_right(reference, PROMPTS, rows, drafts)


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL_DIR, batch_size=8, seq_len=768, enable_eagle_speculation=True)


@pytest.fixture(scope="module")
def goldens():
    return load_goldens()


def test_the_eight_goldens_are_generated(tiny, goldens):
    """In one batch of uneven prompts, and with an acceptance that no draft by chance has: the vocabulary is 2,048."""
    ids, mask = right_pad(goldens.prompts, tiny.config)
    adapter, count = adapter_of(tiny), goldens.tokens.shape[1]
    tokens = adapter.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, speculation="mtp")
    assert torch.equal(tokens[:, ids.shape[1] :], goldens.tokens)
    counts = adapter.speculation_counts
    assert counts.acceptance > 0.5
    assert counts.tokens_per_step == pytest.approx(1 + counts.acceptance)


@pytest.mark.parametrize("weights", ["fp8", "fp8-block"])
def test_fp8_experts_draft_and_verify(half, weights):
    """The draft's experts are of the same form."""
    folder, _ = half
    ids, mask = right_pad(PROMPTS, load_config(folder))
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = adapter_of(load_model(folder, batch_size=len(PROMPTS), weights=weights)).generate(ids, **options)
    drafting = adapter_of(load(folder, weights=weights))
    assert torch.equal(drafting.generate(ids, speculation="mtp", **options), plain)
    assert drafting.speculation_counts.accepted > 0


def test_generation_stops_and_streams_as_without_speculation(tiny, goldens):
    """Rows end at a stop token at different steps, and a processor looks at the tokens so far."""
    prompts = goldens.prompts[:3]
    ids, mask = right_pad(prompts, tiny.config)
    adapter, stop = adapter_of(tiny), [int(goldens.tokens[0, 6]), int(goldens.tokens[2, 11])]
    asked = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": stop}
    asked |= {"repetition_penalty": 1.2}

    class Columns:
        def __init__(self):
            self.put_out, self.ended = [], False

        def put(self, tokens):
            self.put_out.append(tokens.tolist())

        def end(self):
            self.ended = True

    streams = Columns(), Columns()
    plain = adapter.generate(ids, streamer=streams[0], **asked)
    assert torch.equal(adapter.generate(ids, streamer=streams[1], speculation="mtp", **asked), plain)
    assert streams[0].put_out == streams[1].put_out
    assert streams[1].ended


def test_two_ranks_generate_the_same(half):
    folder, reference = half
    tokens = nxdi.run_parallel(_generate_on_rank, 2, folder, initialize=init_embedded)
    assert tokens[0] == tokens[1] == [reference.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]


def _generate_on_rank(folder):
    model = load(folder, 3, tp_degree=2)
    ids, mask = right_pad(PROMPTS, model.config)
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "speculation": "mtp"}
    return adapter_of(model).generate(ids, attention_mask=mask, **asked)[:, ids.shape[1] :].tolist()


def chi_square(counts, probabilities):
    """The statistic, and what it exceeds once in 10,000 times. Classes expected fewer than 5 times are joined."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    joined = [torch.cat((x[~rare], x[rare].sum(0, keepdim=True))) for x in (counts.double(), expected.double())]
    found, wanted = (x[joined[1] > 0] for x in joined)
    degrees = len(wanted) - 1
    # Wilson and Hilferty's approximation of the quantile; 3.72 is that of the normal distribution.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
    return float(((found - wanted) ** 2 / wanted).sum()), limit


def test_sampled_tokens_are_distributed_as_plain_ones(half):
    """The second and third new token, of which a step drafts one or both, given the first: against the model's own
    distribution, 768 draws each."""
    folder, _ = half
    batch, rounds, prompt = 48, 16, PROMPTS[1]
    model = load(folder, 3, batch_size=batch, seq_len=16, blockwise_matmul_config={})
    adapter, ids = adapter_of(model), torch.tensor([prompt]).expand(batch, -1)
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 12, "max_new_tokens": 3}
    set_seed(0)
    drawn = torch.cat([adapter.generate(ids, speculation="mtp", **sampling) for _ in range(rounds)])[:, len(prompt) :]
    assert 0.1 < adapter.speculation_counts.acceptance < 0.9
    set_seed(1)
    plain = torch.cat([adapter.generate(ids, **sampling) for _ in range(rounds)])[:, len(prompt) :]
    for position in range(3):
        pair = [torch.bincount(tokens[:, position], minlength=256) for tokens in (drawn, plain)]
        assert_same_distribution(*pair)


def assert_same_distribution(first, second):
    """Two samples of equal size: of each class, half is expected in either."""
    total = (first + second).double()
    common = total >= 10
    difference = ((first - second).double()[common] ** 2 / total[common]).sum()
    degrees = int(common.sum()) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert difference < limit


def test_rejection_leaves_the_distribution(monkeypatch):
    """Of both tokens of a step, whatever the draft's distribution; a sampler that keeps all drafts is seen."""
    generator = torch.Generator().manual_seed(0)
    q, p, after = (torch.randn(20, generator=generator).mul(1.5).softmax(-1) for _ in range(3))
    rows = 20_000
    choice = TokenChoice([], do_sample=True)
    torch.manual_seed(0)
    known = [torch.tensor([0])] * rows
    drafted, distribution = choice.draft(known, q.log().expand(rows, -1))
    logits = torch.stack((p, after)).log().expand(rows, -1, -1)
    tokens, accepted = choice.verify(known, drafted[:, None], [distribution], logits)
    statistic, limit = chi_square(torch.bincount(tokens[:, 0], minlength=20), p)
    assert statistic < limit
    second = tokens[accepted == 1, 1]
    assert chi_square(torch.bincount(second, minlength=20), after)[0] < limit
    assert accepted.double().mean() == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.02)
    statistic, limit = chi_square(torch.bincount(drafted, minlength=20), p)
    assert statistic > limit


def test_generate_prints_acceptance(capsys):
    command = ["generate", str(TINY_MODEL_DIR), "--prompt-ids", "5,17,42", "--max-new-tokens", "12"]
    command += ["--dtype", "float32"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--mtp"]) == 0
    said = capsys.readouterr().out
    tokens, told = said.rstrip().rsplit("\n", 1)
    assert tokens.splitlines() == plain.splitlines()
    found = re.fullmatch(r"MTP: (\d\.\d\d) tokens per step, (\d+) of (\d+) drafted tokens accepted \((\d+)%\)", told)
    assert 0 < int(found[2]) <= int(found[3])
    assert float(found[1]) == pytest.approx(1 + int(found[2]) / int(found[3]), abs=0.01)


REFUSED = {
    "no layer in config.json": (CONFIGS["v3"], {}, "num_nextn_predict_layers is 0: a deepseek_v3 checkpoint"),
    "V2": (CONFIGS["softmax scores, no YaRN (DeepSeek-V2)"], {}, "a deepseek_v2 checkpoint without an MTP layer"),
    "Kimi-K2": (CONFIGS["one group (Kimi-K2)"] | {"model_type": "kimi_k2"}, {}, "a kimi_k2 checkpoint"),
    "one token": (DRAFTED, {"speculation_length": 1}, "speculation_length 1 must be an integer of at least 2"),
    "speculation_length alone": (
        DRAFTED,
        {"enable_eagle_speculation": False, "speculation_length": 3},
        "set enable_eagle_speculation",
    ),
    "prompts as long as a step": (DRAFTED, {"max_context_length": 2}, "prompts padded to speculation_length 2"),
    "the kernel for prompts": (DRAFTED, {"batch_size": 16}, "choose 128 experts in a step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_draft_is_refused(name):
    fields, neuron, message = REFUSED[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(fields, **{"enable_eagle_speculation": True, **neuron})


def test_a_large_batch_is_warned_of():
    kernel = {"blockwise_matmul_config": {"block_size": 512}}
    with pytest.warns(UserWarning, match="batch of 16"):
        make_config(DRAFTED, enable_eagle_speculation=True, batch_size=16, **kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_config(DRAFTED, enable_eagle_speculation=True, batch_size=15, **kernel)


COPY = MTP_LAYER + "embed_tokens.weight"
DAMAGED = {
    "no MTP layer": (lambda d: [drop(n)(d) for n in mtp_names(d)], "has no tensors of an MTP layer 2"),
    "another embedding": (replace(COPY, lambda t: t + 1), "differs from model.embed_tokens.weight"),
    "another head": (
        replace(MTP_LAYER + "shared_head.head.weight", lambda t: t.flip(0)),
        "differs from lm_head.weight",
    ),
}


def mtp_names(folder):
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return [name for name in names if name.startswith(MTP_LAYER)]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_checkpoint_that_cannot_draft_is_refused(tmp_path, name):
    damage, message = DAMAGED[name]
    folder = write_drafted(tmp_path, "half")
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(folder)


def test_copies_may_be_left_out(half, tmp_path):
    folder = write_drafted(tmp_path, "half")
    drop(COPY)(folder)
    rows, drafts = run(load(folder), PROMPTS, 2)
    assert_right(half[1], PROMPTS, rows, drafts)


def test_generate_refuses_what_it_cannot_do(tiny, half):
    adapter, prompt = adapter_of(tiny), torch.tensor([[5, 17, 42]])
    for arguments, message in (
        ({"speculation": "medusa"}, "speculation 'medusa' is not supported"),
        ({"speculation": "mtp", "max_new_tokens": 766}, "need 769 positions, seq_len is 768"),
        ({"speculation": "mtp", "output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            adapter.generate(prompt, **{"max_new_tokens": 4, **arguments})
    plain = adapter_of(load_model(half[0]))
    with pytest.raises(ConfigError, match="needs enable_eagle_speculation"):
        plain.generate(prompt, speculation="mtp", max_new_tokens=4)


def test_the_config_survives_its_json(half, tmp_path):
    load_config(half[0], enable_eagle_speculation=True, speculation_length=3).save(tmp_path)
    config = DeepseekV3InferenceConfig.load(tmp_path)
    assert config.neuron_config.enable_fused_speculation
    assert config.neuron_config.speculation_length == 3


def test_generation_reaches_the_end_of_the_cache(half):
    """Plain steps to the last position, speculating ones as far as drafted tokens have room."""
    folder, reference = half
    adapter, prompt = adapter_of(load(folder, 3, batch_size=1, seq_len=16)), PROMPTS[1]
    ids = torch.tensor([prompt])
    for options, count in (({}, 11), ({"speculation": "mtp"}, 10)):
        tokens = adapter.generate(ids, max_new_tokens=count, do_sample=False, **options)
        assert tokens[0, len(prompt) :].tolist() == reference.greedy(prompt, count)


def test_another_member_with_the_layer_drafts_too(tmp_path):
    """GLM-4.7-Flash's, whose experts config.json lists by layer: the tokens are those of plain decoding."""
    write_checkpoint(tmp_path, GLM)
    model = load(tmp_path, 3)
    adapter, (ids, mask) = adapter_of(model), right_pad(random_prompts(PROMPT_LENGTHS, GLM["vocab_size"]), model.config)
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(adapter.generate(ids, speculation="mtp", **asked), adapter.generate(ids, **asked))
