"""A latent cache that the ranks share by sequence, on every backend; a test module runs it by importing all of it."""

import pytest
import torch
from nxdi_deepseek import backend
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.latent_cache import ShardedLatentKVCacheManager
from nxdi_deepseek.modeling_deepseek import DeepseekV3InferenceConfig

from support import models, nxdi
from support.models import V3, Session, load_model, make_config, random_prompts

# The tolerance asked for, relative to the largest logit: float32 rounding through three layers.
TOLERANCE = 5e-6
STEPS = 12
PROMPTS = (2, 14, 9, 1)  # fewer tokens than ranks, and lengths that the ranks do not divide
ONE_BY_ONE = {"is_continuous_batching": True, "ctx_batch_size": 1}
PAGED = {"is_prefix_caching": True, "is_block_kv_layout": True, "pa_block_size": 8, "max_context_length": 16}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, V3, seed=0)
    return folder


def forced(model, prompts, tokens):
    """Logits [T + 1, B, V] after the prompts and after each of `tokens` [T, B]; shapes of the cache's tensors."""
    session = Session(model)
    logits = [session.prefill(prompts)]
    logits += [session.decode(row) for row in tokens.tolist()]
    return torch.stack(logits), [tuple(x.shape) for x in module_of(model).kv_mgr.past_key_values]


def module_of(model):
    return model.model if backend.NAME == "embedded" else model.token_generation_model.model


def on_rank(model_dir, cases):
    """Runs in a process of its own. Results of `forced`, of a model for each number of shards, by case."""
    found = {}
    for name, (shards, prompts, tokens, neuron) in cases.items():
        neuron = {"batch_size": len(prompts)} | neuron
        models = (load_model(model_dir, kv_seq_shards=number, **neuron) for number in (1, *shards))
        found[name] = [forced(model, prompts, tokens) for model in models]
    return found


def case(shards, lengths=PROMPTS, vocab=256, tp_degree=4, shared=0, **neuron):
    """shards: numbers to compare with a whole cache on each rank. shared: tokens with which all prompts begin that are
    longer."""
    prompts = random_prompts(lengths, vocab)
    prompts = [prompts[0][:shared] + prompt[shared:] if len(prompt) > shared else prompt for prompt in prompts]
    tokens = torch.tensor(random_prompts([len(lengths)] * STEPS, vocab, seed=1))
    return shards, prompts, tokens, neuron | {"tp_degree": tp_degree}


def run_ranks(model_dir, cases, tp_degree=4):
    """What on_rank gives on each rank, all in one group of processes: these are slow to start."""
    initialize = nxdi.init_cpu_parallel if backend.NAME == "nxdi" else models.init_embedded
    return nxdi.run_parallel(on_rank, tp_degree, str(model_dir), cases, initialize=initialize)


def assert_equal_the_whole_cache(results):
    """results: of `forced` on one rank, the first without shards."""
    (expected, _), *others = results
    for logits, _ in others:
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * expected.abs().max())


CASES = {
    "a batch": case((2, 4), seq_len=52),
    # Lengths that the ranks do not divide; decoding crosses into the next bucket.
    "buckets": case(
        (2, 4),
        enable_bucketing=True,
        seq_len=64,
        max_context_length=20,
        context_encoding_buckets=[12, 20],
        token_generation_buckets=[18, 30, 64],
        **ONE_BY_ONE,
    ),
    "sequence parallelism": case((4,), sequence_parallel_enabled=True, seq_len=64, **ONE_BY_ONE),
    # Prompts in chunks of 16 tokens, a beginning that is found in the cache, and prompts shorter than the group.
    "pool of blocks": case((2, 4), (33, 2, 29, 1), shared=18, seq_len=64, **PAGED),
    "FP8 experts": case((4,), (33, 2, 29, 1), shared=18, seq_len=64, weights="fp8", **PAGED),
    "gathered blocks": case((2, 4), (33, 2, 29, 1), shared=18, seq_len=64, pa_num_blocks=60, **PAGED),
}


@pytest.fixture(scope="session")
def ranks(model_dir):
    return run_ranks(model_dir, CASES)


@pytest.mark.parametrize("name", CASES)
def test_shards_equal_the_whole_cache(ranks, name):
    for found in ranks:
        assert_equal_the_whole_cache(found[name])


def test_each_rank_has_its_rows_and_one_more(ranks):
    widths = [V3["qk_rope_head_dim"], V3["kv_lora_rank"]] * V3["num_hidden_layers"]
    shapes = [shapes for _, shapes in ranks[0]["a batch"]]
    assert shapes == [[(4, 1, rows, width) for width in widths] for rows in (52, 26 + 1, 13 + 1)]


@pytest.mark.parametrize(("name", "blocks"), [("pool of blocks", 4 * 64 // 8), ("gathered blocks", 60)])
def test_each_rank_has_its_part_of_every_block(ranks, name, blocks):
    shapes = [{shape[:3] for shape in shapes} for _, shapes in ranks[0][name]]
    assert shapes == [{(blocks + 1, size, 1)} for size in (8, 4, 2)]


REFUSED = {
    "tp_degree": ({"kv_seq_shards": 3}, "kv_seq_shards 3 does not divide tp_degree 4"),
    "block size": (PAGED | {"kv_seq_shards": 4, "pa_block_size": 2}, "pa_block_size 2 is no multiple"),
    "none": ({"kv_seq_shards": 0}, "kv_seq_shards 0 must be an integer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_field(case):
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as error:
        make_config(V3, **{"tp_degree": 4, "seq_len": 64} | fields)
    assert "\n" not in str(error.value)


def test_shards_survive_saving(tmp_path):
    make_config(V3, tp_degree=4, kv_seq_shards=4).save(tmp_path)
    assert DeepseekV3InferenceConfig.load(str(tmp_path)).neuron_config.kv_seq_shards == 4


@pytest.mark.parametrize("new", [1, 2, 4] if backend.NAME == "nxdi" else [1])  # tokens of a step
def test_a_write_changes_only_the_owners_row(new):
    """All columns of both tensors; on other ranks the last row alone, which is never read."""
    if backend.NAME == "nxdi":
        nxdi.init_cpu_parallel()
    config = make_config(V3, batch_size=2, tp_degree=4, kv_seq_shards=4, seq_len=30)
    manager = ShardedLatentKVCacheManager(config, num_kv_head=1)
    rows, written = -(-30 // 4), 0
    key_values = [tuple(torch.ones(2, 1, new, shape[3]) for shape in (manager.k_shape, manager.v_shape))] * 3
    positions = torch.tensor([[5], [16]]) + torch.arange(new)
    for rank in range(4):
        for cache in manager.past_key_values:
            cache.data.zero_()
        updated = manager.update_cache(
            is_for_context_encoding=False,
            seq_ids=torch.arange(2),
            position_ids=positions,
            new_key_values=key_values,
            seq_len=30,
            shard_rank=torch.tensor([rank], dtype=torch.int32),
        )
        for cache in updated or manager.past_key_values:
            assert cache.shape[2] == rows + 1
            expected = torch.zeros_like(cache)
            for slot, own in enumerate(positions % 4 == rank):
                expected[slot, :, positions[slot][own] // 4] = 1
                written += int(own.sum())
            assert torch.equal(cache[:, :, :-1], expected[:, :, :-1])
    assert written == 2 * new * len(manager.past_key_values)
