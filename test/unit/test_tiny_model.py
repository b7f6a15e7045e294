"""The shipped small model: its format, its perplexity, its routing, its MTP head, its goldens, and the training script.

All by transformers and plain PyTorch; what the backends make of the model is tested elsewhere.
"""

import json
import math
from pathlib import Path

import numpy as np
import nxdi_deepseek
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoTokenizer

from tools.train_tiny import checkpoint, evaluate, ngram, reference, train
from tools.train_tiny.model import TinyDeepseekV3, load_config

FOLDER = Path(nxdi_deepseek.__file__).parent / "data" / "tiny_deepseek_v3"
CONFIG = json.loads((FOLDER / "config.json").read_text())
METRICS = json.loads((FOLDER / "metrics.json").read_text())
MTP_LAYER = CONFIG["num_hidden_layers"]


@pytest.fixture(scope="module")
def dequantized():
    return checkpoint.read_dequantized(FOLDER)


@pytest.fixture(scope="module")
def hugging_face(dequantized):
    return reference.load_reference(CONFIG, dequantized)


@pytest.fixture(scope="module")
def model(dequantized):
    """Plain PyTorch, float32, with the MTP layer."""
    model = TinyDeepseekV3(load_config(FOLDER / "config.json")).eval()
    model.load_state_dict(checkpoint.to_training_names(dequantized, MTP_LAYER))
    return model


@pytest.fixture(scope="module")
def heldout(model):
    """Figures on the shipped held-out excerpt; the routers' loads are left in the model."""
    figures = evaluate.measure(model, evaluate.excerpt_stream(FOLDER), evaluate.WINDOW)
    return figures | {"experts": evaluate.expert_figures(model)}


def stored_tensors():
    """name -> (dtype, shape, shard) read from the shards' headers."""
    found = {}
    for shard in sorted(FOLDER.glob("model-*.safetensors")):
        with safe_open(shard, "pt") as file:
            names = file.keys()
            found |= {
                name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape(), shard.name) for name in names
            }
    return found


def is_unquantized(name):
    """What DeepSeek-V3 stores in BF16 or float32."""
    kept = ("embed_tokens.weight", "head.weight", "norm.weight", "mlp.gate.weight", "eh_proj.weight")
    return name.endswith((*kept, "e_score_correction_bias"))


def test_checkpoint_has_the_released_format():
    tensors = stored_tensors()
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for name, (_, _, shard) in tensors.items()}
    assert len(set(index["weight_map"].values())) > 1
    for name, (dtype, shape, _) in tensors.items():
        if name.endswith("e_score_correction_bias"):
            assert dtype == "F32", name
        elif is_unquantized(name):
            assert dtype == "BF16" and f"{name}_scale_inv" not in tensors, name
        elif not name.endswith("_scale_inv"):
            scale_dtype, scale_shape, _ = tensors[f"{name}_scale_inv"]
            assert (dtype, scale_dtype) == ("F8_E4M3", "F32"), name
            assert scale_shape == [math.ceil(side / 128) for side in shape], name


def test_mtp_layer_carries_its_own_embedding_and_head(dequantized):
    prefix = f"model.layers.{MTP_LAYER}"
    assert torch.equal(dequantized[f"{prefix}.embed_tokens.weight"], dequantized["model.embed_tokens.weight"])
    assert torch.equal(dequantized[f"{prefix}.shared_head.head.weight"], dequantized["lm_head.weight"])
    for part in ("enorm", "hnorm", "shared_head.norm", "input_layernorm"):
        assert dequantized[f"{prefix}.{part}.weight"].shape == (CONFIG["hidden_size"],)
    assert dequantized[f"{prefix}.eh_proj.weight"].shape == (CONFIG["hidden_size"], 2 * CONFIG["hidden_size"])


def test_checkpoint_stays_small():
    extras = ("golden.safetensors", "README.md", "metrics.json", "training_curve.csv", "heldout_excerpt.txt")
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert sum(size for name, size in sizes.items() if name not in extras) <= 8_000_000
    assert sizes["golden.safetensors"] <= 5_000_000


def test_tokenizer_starts_with_bos_and_round_trips():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = 'The "tin" soldier -- café, £5!\n\nHe stood.'
    ids = tokenizer(text).input_ids
    assert ids[0] == CONFIG["bos_token_id"] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id == CONFIG["eos_token_id"]
    assert len(tokenizer) == CONFIG["vocab_size"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@torch.no_grad()
def test_transformers_perplexity_is_the_trained_one(hugging_face, heldout):
    """Two implementations of one model differ by float32 rounding, about 1e-5 per logit; 1 % is the promise."""
    windows = train.heldout_windows(evaluate.excerpt_stream(FOLDER), evaluate.WINDOW)
    losses = [
        F.cross_entropy(hugging_face(window[:, :-2], use_cache=False).logits.flatten(0, 1), window[:, 1:-1].flatten())
        for window in windows.split(1)
    ]
    perplexity = math.exp(sum(losses) / len(losses))
    assert perplexity == pytest.approx(heldout["perplexity"], rel=1e-3)
    assert perplexity == pytest.approx(METRICS["bf16"]["excerpt"]["perplexity"], rel=0.01)


def test_fp8_perplexity_within_three_percent_of_bf16(heldout):
    assert heldout["perplexity"] <= 1.03 * METRICS["bf16"]["excerpt"]["perplexity"]
    assert METRICS["fp8"]["heldout"]["perplexity"] <= 1.03 * METRICS["bf16"]["heldout"]["perplexity"]


def test_it_has_learned_more_than_the_ngram_baseline(heldout):
    """The excerpt is a fifth of the held-out text, which has the same perplexity within 2 %."""
    assert heldout["perplexity"] < 0.75 * METRICS["baselines"]["ngram_perplexity"]


def test_experts_are_used_evenly(heldout):
    for layer, figures in enumerate(heldout["experts"], start=CONFIG["first_k_dense_replace"]):
        assert figures["smallest_load"] > 0, f"dead expert in layer {layer}"
        assert figures["largest_load"] <= 3, f"layer {layer}"
        assert figures["bias_spread"] > 0.05, f"layer {layer}"


def test_biased_scores_stay_positive(model):
    """So masking closed groups with 0, as transformers does, selects as masking with -inf does."""
    assert all(gate.e_score_correction_bias.min() >= 0 for gate in model.gates)


def test_mtp_predicts_the_token_after_next(heldout):
    """Against the main head's own guess at that distance, and a bigram table that sees the same next token."""
    assert heldout["mtp_accuracy"] > 10 * heldout["main_accuracy_after_next"]
    assert heldout["mtp_accuracy"] > 1.5 * METRICS["baselines"]["bigram_accuracy"]
    assert heldout["mtp_perplexity"] < METRICS["baselines"]["ngram_perplexity"]


def test_mtp_acceptance_is_the_published_one(model, heldout):
    """0.01 is two standard errors of a rate of 0.66 over the excerpt's 9,700 tokens."""
    assert heldout["mtp_acceptance"] == pytest.approx(METRICS["fp8"]["excerpt"]["mtp_acceptance"], abs=0.01)
    assert evaluate.greedy_acceptance(model, FOLDER) == pytest.approx(METRICS["fp8"]["greedy_acceptance"], abs=0.01)


@torch.no_grad()
def test_goldens_are_what_transformers_computes(hugging_face):
    with safe_open(FOLDER / "golden.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
        ids, lengths, tokens, logits = map(file.get_tensor, ("prompt_ids", "prompt_lengths", "tokens", "logits"))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert logits.shape == (8, 64, CONFIG["vocab_size"]) and logits.dtype == torch.float32
    assert torch.equal(logits.argmax(-1), tokens)
    assert max(lengths) > CONFIG["rope_scaling"]["original_max_position_embeddings"]
    for row, length in enumerate(lengths.tolist()):
        assert ids[row, :length].tolist() == tokenizer(prompts[row]).input_ids
        sequence = torch.cat((ids[row, :length], tokens[row, :-1]))
        fresh = hugging_face(sequence[None], use_cache=False).logits[0, length - 1 :]
        # Logits reach 20, so one float32 ulp is 2e-6; sums in another order cost tens of them.
        torch.testing.assert_close(fresh, logits[row], rtol=0, atol=2e-4)


def test_released_names_round_trip(model):
    state = model.state_dict()
    released = checkpoint.to_released_names(state, MTP_LAYER)
    assert set(released) == {name for name in stored_tensors() if not name.endswith("_scale_inv")}
    back = checkpoint.to_training_names(released, MTP_LAYER)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_twenty_training_steps_on_the_cpu(tmp_path):
    """From the uniform ln 2048 = 7.62 nats; both stages run, and the biases move by gamma a step."""
    stream = evaluate.excerpt_stream(FOLDER).numpy().astype(np.uint16)
    np.savez(tmp_path / "tokens.npz", train=stream[:-600], heldout=stream[-600:])
    options = ["--steps", "20", "--tokens-per-step", "256", "--windows", "64", "128", "--eval-every", "20"]
    args = train.parse_args(["--tokens", str(tmp_path / "tokens.npz"), "--out", str(tmp_path), *options])
    trained, rows = train.train(args, torch.device("cpu"))
    train.save(trained, rows, tmp_path)
    assert rows[-1][2] < math.log(CONFIG["vocab_size"]) - 0.5
    for gate in trained.gates:
        assert 0 < gate.e_score_correction_bias.max() <= 2 * 20 * train.BIAS_SPEED + 1e-6
    assert (tmp_path / "trained.safetensors").exists()
    assert (tmp_path / "curve.csv").read_text().startswith("step,tokens,train_loss")


def test_ngram_probabilities_sum_to_one():
    stream = np.random.default_rng(0).integers(0, 30, 2000)
    orders = ngram.build(stream, 3)
    for context in (ngram.pack(stream[:2], 2)[0], ngram.pack(np.array([7, 2047]), 2)[0]):  # seen, and never seen
        keys = (context << ngram.BITS) | np.arange(ngram.VOCAB)
        probability = np.full(ngram.VOCAB, 1 / ngram.VOCAB)
        for size, order in enumerate(orders, start=1):
            probability = order.probability(keys & ((1 << (ngram.BITS * size)) - 1), probability)
        assert probability.sum() == pytest.approx(1, abs=1e-9)
