"""Every module of the model against Hugging Face's, on every backend; a test module runs it by importing all of it."""

import pytest
import torch
from nxdi_deepseek.accuracy.recording import Entry
from nxdi_deepseek.accuracy.reference import hugging_face_model, reference_logits
from nxdi_deepseek.accuracy.runner import Runner, decoder_modules, teacher_forced
from nxdi_deepseek.accuracy.tracing import interleave
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.rope_util import rotate_interleaved
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from support.models import CONFIGS, load_model, random_prompts

# Largest difference relative to the largest value, float32 against float32. Sums of n terms in two orders differ by
# about sqrt(n) * 2^-24, a largest difference among thousands is about 4 times that, and chained sums add up: n is the
# number of terms from input to output. Angles of RoPE have the relative error of their frequency, times the position.
U = 2.0**-24
THRESHOLDS = {
    "norm": 4 * 96**0.5 * U,
    "rope": 4 * 200 * U,  # positions up to 200
    "attention": 4 * 3000**0.5 * U,  # hidden, two ranks, head widths, keys, heads * v: below 1000, through a softmax
    "cache latent": 4 * 200**0.5 * U,
    "cache rope": 4 * 200**0.5 * U,
    "router": 4 * 100**0.5 * U,
    "experts": 4 * 300**0.5 * U,
    "shared experts": 4 * 300**0.5 * U,
    "dense MLP": 4 * 300**0.5 * U,
    "decoder layer": 4 * 4000**0.5 * U,
    "model": 4 * 12000**0.5 * U,
}
NAMES = ("v3", "no q_lora (Moonlight)", "v wider than nope", "attention_bias", "two shared experts")
DENSE, SPARSE = 0, 1
B, S = 2, 11


class Pair:
    """Our model and Hugging Face's, with the same weights."""

    def __init__(self, model_dir):
        self.model = load_model(model_dir, batch_size=B, seq_len=64)
        (self.ours,) = decoder_modules(self.model)
        self.theirs = hugging_face_model(model_dir)

    def layers(self, number):
        return self.ours.layers[number], self.theirs.model.layers[number]

    def their_inputs(self, hidden_states):
        """What Hugging Face's attention and layer take besides hidden states."""
        positions = torch.arange(hidden_states.shape[1])[None]
        mask = torch.full((hidden_states.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        embeddings = self.theirs.model.rotary_emb(hidden_states, positions)
        return {"attention_mask": mask, "position_embeddings": embeddings}


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("modules")
    write_checkpoint(model_dir, CONFIGS[request.param], seed=7)
    with torch.no_grad():
        yield Pair(model_dir)


@pytest.fixture
def hidden_states(pair):
    return torch.randn(B, S, pair.model.config.hidden_size, generator=torch.Generator().manual_seed(3))


POSITIONS = torch.arange(S).expand(B, -1)


def output_of(module, run):
    """What a module inside gives while run() runs."""
    seen = []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    run()
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_norm(pair, hidden_states, agree):
    ours, theirs = pair.layers(DENSE)
    for name in ("input_layernorm", "post_attention_layernorm"):
        agree(getattr(ours, name)(hidden_states), getattr(theirs, name)(hidden_states), THRESHOLDS["norm"])


def test_rope(pair, agree):
    generator = torch.Generator().manual_seed(0)
    ours, _ = pair.layers(DENSE)
    dim = pair.model.config.qk_rope_head_dim
    query, key = torch.randn(B, 8, S, dim, generator=generator), torch.randn(B, 1, S, dim, generator=generator)
    positions = torch.stack((torch.arange(S), torch.arange(180, 180 + S)))
    cos, sin = ours.self_attn.rotary_emb(positions)
    expected = apply_rotary_pos_emb_interleave(query, key, *pair.theirs.model.rotary_emb(query, positions))
    for tensor, rotated in zip((query, key), expected, strict=True):
        agree(rotate_interleaved(tensor, cos, sin), interleave(rotated), THRESHOLDS["rope"])


def test_attention_of_a_prompt(pair, hidden_states, agree):
    ours, theirs = pair.layers(DENSE)
    expected, _ = theirs.self_attn(hidden_states, **pair.their_inputs(hidden_states))
    agree(ours.self_attn(hidden_states, None, POSITIONS)[0], expected, THRESHOLDS["attention"])


def test_attention_of_a_new_token(pair, hidden_states, agree):
    ours, theirs = pair.layers(DENSE)
    expected, _ = theirs.self_attn(hidden_states, **pair.their_inputs(hidden_states))
    for length in (1, S - 1):
        _, cached, *_ = ours.self_attn(hidden_states[:, :length], None, POSITIONS[:, :length])
        new = slice(length, length + 1)
        mask = torch.ones(B, 1, 1, length, dtype=torch.bool)
        output = ours.self_attn(hidden_states[:, new], mask, POSITIONS[:, new], past_key_value=cached)[0]
        agree(output, expected[:, new], THRESHOLDS["attention"])


def cached_tensors(pair, layer):
    """K and V slots [B, 1, L, .] after a prompt of 5 tokens and 4 new ones, each with what Hugging Face computes."""
    entries = [Entry(None, prompt[:5], [*prompt[5:], 2]) for prompt in random_prompts((9, 9))]
    teacher_forced(Runner(pair.model), entries)
    tokens = torch.tensor([entry.prompt + entry.tokens[:-1] for entry in entries])
    attention = pair.theirs.model.layers[layer].self_attn
    normed = output_of(pair.theirs.model.layers[layer].input_layernorm, lambda: pair.theirs(tokens, use_cache=False))
    key, value = (tensor[:, :, :9] for tensor in pair.ours.kv_mgr.past_key_values[2 * layer : 2 * layer + 2])
    latent, k_pe = attention.kv_a_proj_with_mqa(normed).split((value.shape[-1], key.shape[-1]), -1)
    positions = torch.arange(9).expand(B, -1)
    rotary = pair.theirs.model.rotary_emb(normed, positions)
    _, k_pe = apply_rotary_pos_emb_interleave(k_pe[:, None], k_pe[:, None], *rotary)
    return key, interleave(k_pe), value, attention.kv_a_layernorm(latent)[:, None]


def test_cache_holds_the_latent(pair, agree):
    _, _, value, latent = cached_tensors(pair, DENSE)
    agree(value, latent, THRESHOLDS["cache latent"])


def test_cache_holds_the_rotated_key(pair, agree):
    key, k_pe, _, _ = cached_tensors(pair, DENSE)
    agree(key, k_pe, THRESHOLDS["cache rope"])


def their_routing(gate, tokens):
    """Indices [T, K] and weights [T, K]; transformers 5 puts its logits ahead of them, and the weights first."""
    return sorted(gate(tokens)[-2:], key=torch.is_floating_point)


def test_router(pair, hidden_states, agree):
    ours, theirs = (layer.mlp for layer in pair.layers(SPARSE))
    _, weights, chosen = ours.router(hidden_states)
    index, expected = their_routing(theirs.gate, hidden_states)
    assert torch.equal(chosen.sort(-1).values, index.sort(-1).values)
    agree(weights, torch.zeros_like(weights).scatter(-1, index, expected), THRESHOLDS["router"])


def test_experts(pair, hidden_states, agree):
    ours, theirs = (layer.mlp for layer in pair.layers(SPARSE))
    tokens = hidden_states.flatten(0, 1)
    run = getattr(theirs, "moe", theirs.experts)  # transformers 4 has `moe`
    expected = run(tokens, *their_routing(theirs.gate, hidden_states))
    output = output_of(ours.expert_mlps, lambda: ours(hidden_states))
    agree(output.reshape(expected.shape), expected, THRESHOLDS["experts"])


def test_shared_experts(pair, hidden_states, agree):
    ours, theirs = (layer.mlp for layer in pair.layers(SPARSE))
    output = output_of(ours.shared_experts, lambda: ours(hidden_states))
    agree(output.reshape(hidden_states.shape), theirs.shared_experts(hidden_states), THRESHOLDS["shared experts"])


def test_dense_mlp(pair, hidden_states, agree):
    ours, theirs = (layer.mlp for layer in pair.layers(DENSE))
    agree(ours(hidden_states), theirs(hidden_states), THRESHOLDS["dense MLP"])


@pytest.mark.parametrize("number", [DENSE, SPARSE])
def test_decoder_layer(pair, hidden_states, number, agree):
    ours, theirs = pair.layers(number)
    expected = theirs(hidden_states, **pair.their_inputs(hidden_states))
    agree(ours(hidden_states, None, POSITIONS)[0], expected, THRESHOLDS["decoder layer"])


def test_model(pair, agree):
    entries = [Entry(None, prompt[:-6], prompt[-6:]) for prompt in random_prompts((9, 15), seed=5)]
    for entry, logits in zip(entries, teacher_forced(Runner(pair.model), entries), strict=True):
        expected = reference_logits(pair.theirs, entry.prompt + entry.tokens)[len(entry.prompt) - 1 : -1]
        agree(logits, expected, THRESHOLDS["model"], logits=True)
