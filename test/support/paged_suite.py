"""What a cache in blocks must do on every backend; a test module runs it by importing all of it."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from nxdi_deepseek import backend, modeling_deepseek
from nxdi_deepseek.accuracy.reference import hugging_face_model, reference_logits
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.paged_requests import _joined
from transformers.modeling_outputs import CausalLMOutputWithPast

from support import models, nxdi
from support.models import CONFIGS, V3, Session, greedy, load_config, load_model, random_prompts

# As in parity_suite: float32 rounding reached two thirds of it.
TOLERANCE = 1e-4
# Two ways to the same sums, in float32: what differs is their order alone.
SAME_SUMS = 2e-5
PAGED = {"is_prefix_caching": True, "is_block_kv_layout": True, "pa_block_size": 8}
CHUNKS = PAGED | {"max_context_length": 32}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paged")
    write_checkpoint(folder, V3, 0)
    return folder


@pytest.fixture(scope="module")
def expected(model_dir):
    """Hugging Face's logits [T, V] behind each of the last T tokens."""
    reference = hugging_face_model(model_dir)

    def logits(tokens, count):
        return reference_logits(reference, tokens)[-count:]

    return logits


def shared_beginnings(lengths, shared, vocab_size=256, seed=0):
    """Prompts of these lengths that begin with the same `shared` tokens."""
    prompts = random_prompts(lengths, vocab_size, seed)
    return [prompts[0][:shared] + prompt[shared:] for prompt in prompts]


def module_of(model):
    return model.model if backend.NAME == "embedded" else model.token_generation_model.model


def cache_of(model):
    """The blocks of each layer, (k_pe, latent)."""
    return [tensor.detach() for tensor in module_of(model).kv_mgr.past_key_values]


def rows_of(model, slot, count):
    """What the cache holds of a sequence's first tokens: [count, width] per tensor."""
    size = model.neuron_config.pa_block_size
    table = torch.tensor(model.paged.pool.blocks_of(slot))
    places = table.repeat_interleave(size)[:count] * size + torch.arange(count) % size
    return [tensor.flatten(0, 1)[places, 0].clone() for tensor in cache_of(model)]


@contextmanager
def counted_calls():
    """Calls of the two forms of attention, by their names."""
    calls = {"expanded_attention": 0, "absorbed_attention": 0}

    def counting(name):
        function = getattr(modeling_deepseek, name)

        def count(*args, **kw):
            calls[name] += 1
            return function(*args, **kw)

        return mock.patch.object(modeling_deepseek, name, count)

    with counting("expanded_attention"), counting("absorbed_attention"):
        yield calls


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("chunk", [24, 32])
def test_prompts_in_chunks_equal_hugging_face(model_dir, expected, chunk, seed):
    """Longer than a chunk, a little longer, one token, nearly the longest; decoding behind each."""
    model = load_model(model_dir, batch_size=4, **PAGED | {"max_context_length": chunk, "seq_len": 144})
    prompts = random_prompts((93, chunk + 1, 1, 120), seed=seed)
    tokens, logits = greedy(model, prompts, 20)
    for row, prompt in enumerate(prompts):
        wanted = expected(prompt + tokens[row, :-1].tolist(), 20)
        torch.testing.assert_close(logits[row], wanted, rtol=0, atol=TOLERANCE)
        assert torch.equal(tokens[row], wanted.argmax(-1))


@pytest.mark.parametrize("name", ["v wider than nope", "no q_lora (Moonlight)", "attention_bias"])
def test_other_members_in_chunks_equal_hugging_face(tmp_path, name):
    write_checkpoint(tmp_path, CONFIGS[name], 0)
    reference = hugging_face_model(tmp_path)
    prompts = shared_beginnings((70, 50), 40)
    tokens, logits = greedy(load_model(tmp_path, batch_size=2, **CHUNKS), prompts, 8)
    for row, prompt in enumerate(prompts):
        wanted = reference_logits(reference, prompt + tokens[row, :-1].tolist())[-8:]
        torch.testing.assert_close(logits[row], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [31, 32, 33, 96, 17 * 32])
def test_chunks_equal_one_shot_in_logits_and_cache(model_dir, length):
    (prompt,) = random_prompts((length,), seed=length)
    lengths = {"seq_len": 576, "batch_size": 1}
    in_chunks = load_model(model_dir, **CHUNKS | lengths)
    at_once = load_model(model_dir, **PAGED | lengths | {"max_context_length": 576})
    ours, wanted = (Session(model).prefill([prompt]) for model in (in_chunks, at_once))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=SAME_SUMS)
    for row, other in zip(rows_of(in_chunks, 0, length), rows_of(at_once, 0, length), strict=True):
        torch.testing.assert_close(row, other, rtol=0, atol=SAME_SUMS * other.abs().max().item())


@pytest.mark.parametrize("hit", [0, 8, 40, 63])
def test_a_shared_beginning_is_computed_once(model_dir, expected, hit):
    """Blocks of 8: none shared, one, five and all but the last, whose prompt is the same as far as it goes."""
    model = load_model(model_dir, batch_size=2, **CHUNKS)
    session = Session(model)
    first, second = shared_beginnings((64, 64), hit, seed=hit)
    session.prefill([first], [0])
    logits = [session.prefill([second], [1])]
    assert model.paged.reused == hit // 8 * 8
    assert model.paged.computed == 128 - hit // 8 * 8
    logits.append(session.decode([7], [1]))
    torch.testing.assert_close(torch.cat(logits), expected([*second, 7], 2), rtol=0, atol=TOLERANCE)


def test_the_same_prompt_again_computes_its_last_block(model_dir, expected):
    model = load_model(model_dir, batch_size=2, **CHUNKS)
    (prompt,) = random_prompts((64,))
    logits = Session(model).prefill([prompt, prompt])
    assert (model.paged.computed, model.paged.reused) == (64 + 8, 56)
    torch.testing.assert_close(logits, expected(prompt, 1).expand(2, -1), rtol=0, atol=TOLERANCE)


def test_shared_blocks_stay_as_they_are_while_others_decode(model_dir, expected):
    """Three sequences that share 40 tokens, one of which departs inside a block; steps of some of them in any order."""
    model = load_model(model_dir, batch_size=3, **CHUNKS)
    session = Session(model)
    prompts = shared_beginnings((60, 44, 52), 40)
    prompts[2] = prompts[0][:43] + prompts[2][43:]
    tokens = {slot: list(prompt) for slot, prompt in enumerate(prompts)}
    logits = {slot: session.prefill([prompts[slot]], [slot]) for slot in tokens}
    shared = [block.clone() for block in rows_of(model, 0, 40)]
    for slots in ([2, 0, 1], [1], [2, 1], [0, 2], [1, 2, 0], [2]):
        for slot in slots:
            tokens[slot].append(int(logits[slot].argmax()))
        for slot, row in zip(slots, session.decode([tokens[slot][-1] for slot in slots], slots), strict=True):
            logits[slot] = row
    for slot, sequence in tokens.items():
        torch.testing.assert_close(logits[slot], expected(sequence, 1)[0], rtol=0, atol=TOLERANCE)
    for slot in tokens:
        for now, before in zip(rows_of(model, slot, 40), shared, strict=True):
            assert torch.equal(now, before)


def test_a_zeroed_shared_block_moves_the_logits(model_dir, expected):
    """The control: a sequence really reads the blocks that it shares."""
    model = load_model(model_dir, batch_size=2, **CHUNKS)
    session = Session(model)
    first, second = shared_beginnings((40, 48), 32)
    session.prefill([first], [0])
    block = model.paged.pool.blocks_of(0)[1]
    for tensor in cache_of(model):
        tensor[block] = 0
    departure = session.prefill([second], [1])[0] - expected(second, 1)[0]
    assert departure.abs().max() > 100 * TOLERANCE


def test_the_smallest_pool_evicts_and_never_forgets(model_dir, expected):
    """One slot of 128 tokens, 16 blocks: each prompt takes the place of one before it; some begin as an older one."""
    model = load_model(model_dir, batch_size=1, **CHUNKS)
    assert model.neuron_config.pa_num_blocks == 16
    session = Session(model)
    old, *others = random_prompts((64, 100, 64, 120), seed=3)
    for prompt in (old, others[0], old, old[:32] + others[1][:40], others[2], old):
        wanted = expected(prompt, 1)
        torch.testing.assert_close(session.prefill([prompt], [0]), wanted, rtol=0, atol=TOLERANCE)
    assert 0 < model.paged.reused < 64 + 32 + 64


@pytest.mark.parametrize("weights", ["fp8", "fp8-block"])
def test_fp8_experts_in_chunks_equal_one_shot(model_dir, weights):
    prompts = shared_beginnings((70, 50), 40)
    fp8 = {"batch_size": 2, "weights": weights}
    _, ours = greedy(load_model(model_dir, **fp8, **CHUNKS), prompts, 8)
    _, wanted = greedy(load_model(model_dir, **fp8), prompts, 8)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=TOLERANCE)


class Tables:
    """A caller with tables of its own, as vLLM's plugin: blocks in any order, from 1 on, padded to the longest."""

    def __init__(self, model, blocks):
        self.model, self.tables, self.slots = model, blocks, {name: slot for slot, name in enumerate(blocks)}
        self.size, self.width = model.neuron_config.pa_block_size, model.neuron_config.max_length

    def table(self, name):
        blocks = self.tables[name]
        return blocks + [0] * (self.width // self.size - len(blocks))

    def slot(self, name, position):
        return self.tables[name][position // self.size] * self.size + position % self.size

    def prefill(self, name, prompt, computed):
        slots = [self.slot(name, position) for position in range(computed, len(prompt))]
        return self._run(
            [name],
            torch.tensor([prompt]),
            torch.arange(len(prompt))[None],
            [self.table(name)],
            [slots + [-1] * (self.width - len(slots))],
            [computed],
        )

    def decode(self, names, tokens, positions):
        slots = [[self.slot(name, position)] for name, position in zip(names, positions, strict=True)]
        tables = [self.table(name) for name in names]
        return self._run(
            names, torch.tensor(tokens)[:, None], torch.tensor(positions)[:, None], tables, slots, positions
        )

    @torch.no_grad()
    def _run(self, names, ids, positions, tables, slots, computed):
        return self.model(
            input_ids=ids,
            position_ids=positions,
            seq_ids=torch.tensor([self.slots[name] for name in names]),
            block_table=torch.tensor(tables),
            slot_mapping=torch.tensor(slots),
            full_context_lens=positions.max(-1, keepdim=True).values + 1,
            computed_context_lens=torch.tensor(computed)[:, None],
        ).logits[:, -1]


def test_tables_of_the_caller_in_any_order(model_dir, expected):
    """Shuffled blocks, 40 tokens shared and read by two, steps of one and of both."""
    model = load_model(model_dir, batch_size=2, **CHUNKS | {"pa_num_blocks": 33})
    order = (torch.randperm(32, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    caller = Tables(model, {"a": order[:10], "b": order[:5] + order[10:15]})
    a, b = shared_beginnings((60, 52), 40)
    logits = {"a": caller.prefill("a", a, 0)[0], "b": caller.prefill("b", b, 40)[0]}
    texts = {"a": a, "b": b}
    for names in ("ab", "b", "ba", "a"):
        tokens = [int(logits[name].argmax()) for name in names]
        positions = [len(texts[name]) for name in names]
        for name, token in zip(names, tokens, strict=True):
            texts[name] = [*texts[name], token]
        for name, row in zip(names, caller.decode(list(names), tokens, positions), strict=True):
            logits[name] = row
    for name, text in texts.items():
        torch.testing.assert_close(logits[name], expected(text, 1)[0], rtol=0, atol=TOLERANCE)


def test_tables_in_part_are_refused(model_dir):
    model = load_model(model_dir, batch_size=1, **CHUNKS)
    with pytest.raises(ConfigError, match="slot_mapping, full_context_lens, computed_context_lens missing"):
        model(
            input_ids=torch.ones(1, 4, dtype=torch.int64),
            position_ids=torch.arange(4)[None],
            block_table=torch.zeros(1, 16, dtype=torch.int64),
        )


def test_tables_that_lead_nowhere_are_refused(model_dir):
    model = load_model(model_dir, batch_size=1, **CHUNKS)
    with pytest.raises(ConfigError, match="block_table names blocks outside 0 to 15, pa_num_blocks 16"):
        Tables(model, {"a": [16]}).prefill("a", [5, 6, 7], 0)
    with pytest.raises(ConfigError, match="computed_context_lens must leave a token"):
        Tables(model, {"a": [1]}).prefill("a", [5, 6, 7], 3)


def test_a_step_back_is_refused(model_dir):
    """It would leave other tokens in a block than those that it is found by."""
    model = load_model(model_dir, batch_size=1, **CHUNKS)
    session = Session(model)
    session.prefill([[5] * 9])
    session.decode([6])
    session.lengths[0] = 8
    with pytest.raises(ConfigError, match="position 8 does not follow the 10 tokens of slot 0"):
        session.decode([7])


def test_rows_of_lists_are_joined_too():
    """As NxDI's outputs with on-device sampling and output_logits have them."""
    joined = _joined(
        [CausalLMOutputWithPast(logits=torch.ones(1, 2), hidden_states=[torch.full((1,), i)]) for i in (3, 4)]
    )
    assert joined.logits.shape == (2, 2)
    assert joined.hidden_states[0].tolist() == [3, 4]


def test_tables_in_some_calls_only_are_refused(model_dir):
    """The blocks of one side would be overwritten by the other."""
    model = load_model(model_dir, batch_size=1, **CHUNKS)
    Session(model).prefill([[5, 6, 7]])
    with pytest.raises(ConfigError, match="block_table is given in some calls only"):
        Tables(model, {"a": [1, 2]}).prefill("a", [5, 6, 7], 0)


@pytest.mark.parametrize(
    ("blocks", "pool"), [(32, True), (48, True), (49, False)], ids=["the pool", "1.5 times", "gathered"]
)
def test_steps_read_the_pool_while_it_is_at_most_half_as_large_again(model_dir, expected, blocks, pool):
    """2 sequences of 16 blocks. The reserve block counts, as it is read."""
    model = load_model(model_dir, batch_size=2, **CHUNKS | {"pa_num_blocks": blocks - (blocks > 32)})
    session = Session(model)
    prompts = shared_beginnings((40, 20), 16)
    tokens = session.prefill(prompts).argmax(-1).tolist()
    manager = module_of(model).kv_mgr
    with mock.patch.object(type(manager), "pool_mask", autospec=True, side_effect=type(manager).pool_mask) as masks:
        logits = session.decode(tokens)
    assert masks.call_count == pool
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[row], expected([*prompt, tokens[row]], 1)[0], rtol=0, atol=TOLERANCE)


def test_long_chunks_expand_their_prefix_and_short_ones_absorb(model_dir):
    """At these sizes (32 and 24 wide keys and values, rank 48) expanding pays from 68 queries on."""
    layers = V3["num_hidden_layers"]
    buckets = {"max_context_length": 80, "context_encoding_buckets": [16, 80], "prefix_buckets": [144]}
    model = load_model(model_dir, batch_size=1, **PAGED | buckets | {"seq_len": 160})
    with counted_calls() as calls:
        Session(model).prefill(random_prompts((160,)))
    assert calls == {"expanded_attention": 2 * layers, "absorbed_attention": 0}
    with counted_calls() as calls:
        Session(model).prefill(random_prompts((96,), seed=1))
    assert calls == {"expanded_attention": layers, "absorbed_attention": layers}


def generate_on_rank(model_dir, tp_degree, prompts, neuron):
    """Runs in a process of its own."""
    model = load_model(model_dir, batch_size=len(prompts), tp_degree=tp_degree, **neuron)
    return greedy(model, prompts, 6)


@pytest.mark.parametrize(
    ("tp_degree", "sequence_parallel"), [(2, False), (2, True), (4, True)], ids=["TP 2", "TP 2 + SP", "TP 4 + SP"]
)
def test_tensor_parallel_equals_hugging_face(model_dir, expected, tp_degree, sequence_parallel):
    prompts = shared_beginnings((50, 44), 40)
    neuron = CHUNKS | {"sequence_parallel_enabled": sequence_parallel}
    initialize = nxdi.init_cpu_parallel if backend.NAME == "nxdi" else models.init_embedded
    for tokens, logits in nxdi.run_parallel(
        generate_on_rank, tp_degree, str(model_dir), tp_degree, prompts, neuron, initialize=initialize
    ):
        for row, prompt in enumerate(prompts):
            wanted = expected(prompt + tokens[row, :-1].tolist(), 6)
            torch.testing.assert_close(logits[row], wanted, rtol=0, atol=TOLERANCE)


def test_generation_takes_prompts_that_share_a_beginning(model_dir, expected):
    model = load_model(model_dir, batch_size=3, **CHUNKS)
    prompts = shared_beginnings((60, 41, 52), 40)
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    adapter = backend.HuggingFaceGenerationAdapter(model)
    output = adapter.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for row, prompt in enumerate(prompts):
        new = output[row, width:].tolist()
        assert new == expected(prompt + new[:-1], 8).argmax(-1).tolist()
    assert model.paged.reused == 2 * 40


REFUSED = {
    "only prefix caching": ({"is_prefix_caching": True}, "is_prefix_caching without is_block_kv_layout"),
    "only blocks": ({"is_block_kv_layout": True}, "is_block_kv_layout without is_prefix_caching"),
    "prompts together": (PAGED | {"ctx_batch_size": 2}, "ctx_batch_size 2 with is_block_kv_layout"),
    "seq_len": (PAGED | {"seq_len": 124}, "124 is no multiple of pa_block_size 8"),
    "chunk": (PAGED | {"max_context_length": 36}, "max_context_length 36 is no multiple of pa_block_size 8"),
    "prompt buckets": (
        PAGED | {"context_encoding_buckets": [12, 128]},
        "context_encoding_buckets 12 is no multiple of pa_block_size 8",
    ),
    "step buckets": (
        PAGED | {"token_generation_buckets": [12, 128]},
        "token_generation_buckets 12 is no multiple of pa_block_size 8",
    ),
    "prefix buckets": (CHUNKS | {"prefix_buckets": [60, 96]}, "prefix_buckets 60 is no multiple of pa_block_size 8"),
    "short prefixes": (CHUNKS | {"prefix_buckets": [32, 64]}, "prefix_buckets end at 64, .* add a bucket of 96"),
    "few blocks": (PAGED | {"pa_num_blocks": 31}, "pa_num_blocks 31 cannot hold 2 sequences of 128 tokens"),
    "flash decoding": (PAGED | {"flash_decoding_enabled": True}, "flash_decoding_enabled"),
    "windows": (PAGED | {"windowed_context_encoding_size": 32}, "windowed_context_encoding_size"),
    "attention DP": (PAGED | {"attention_dp_degree": 2}, "attention_dp_degree|DP Degree"),
    "quantized cache": (PAGED | {"kv_cache_quant": True}, "kv_cache_quant"),
    "block kernels": (PAGED | {"attn_block_tkg_nki_kernel_enabled": True}, "attn.block.tkg.nki.kernel.enabled"),
    "truncation": (PAGED | {"allow_input_truncation": True}, "allow_input_truncation"),
    "async": (PAGED | {"async_mode": True}, "async_mode"),
    "chunked prefill": (PAGED | {"chunked_prefill_config": {}}, "chunked_prefill_config|is_chunked_prefill"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_answer_wrong_or_fail_later_are_refused(model_dir, case):
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        load_config(model_dir, **{"batch_size": 2} | fields)


def test_the_config_survives_its_json(model_dir, tmp_path):
    config = load_config(model_dir, batch_size=2, **CHUNKS)
    config.save(tmp_path)
    again = type(config).load(tmp_path).neuron_config
    for name in ("is_prefix_caching", "is_block_kv_layout", "pa_num_blocks", "pa_block_size", "prefix_buckets"):
        assert getattr(again, name) == getattr(config.neuron_config, name), name
