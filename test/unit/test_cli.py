"""The commands `generate` and `demo`, as a user runs them."""

import pytest
import torch
from nxdi_deepseek.accuracy import reference
from nxdi_deepseek.accuracy.reference import hugging_face_model
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.commands import demo
from nxdi_deepseek.example_configs import DEMO_CONFIG
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, DEMO_CONFIG)
    return path


@pytest.fixture(scope="module")
def model_dir_with_tokenizer(tmp_path_factory):
    """A tokenizer of one token per byte; the vocabulary of the model is larger."""
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, DEMO_CONFIG)
    vocab = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def generate(capsys, model_dir, *arguments):
    """The printed lines after the one that names the backend."""
    assert main(["generate", str(model_dir), "--dtype", "float32", *arguments]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("backend: embedded runtime")
    return rest


def test_demo_matches_hugging_face(capsys):
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "As soon as breakfast was over, Jane" in out
    assert "top-1 agreement with Hugging Face: 128 of 128" in out
    assert "verdict: MATCH" in out


def test_demo_fails_when_one_logit_differs(capsys, monkeypatch):
    def shifted(model, token_ids):
        logits = reference.reference_logits(model, token_ids)
        logits[-2, 0] += 2 * demo.TOLERANCE
        return logits

    monkeypatch.setattr(demo, "reference_logits", shifted)
    assert main(["demo", "--max-new-tokens", "4"]) == 1
    assert "verdict: NO MATCH" in capsys.readouterr().out


def test_generate_ids_equals_hugging_face(capsys, model_dir):
    lines = generate(capsys, model_dir, "--prompt-ids", "5,17,42", "--prompt-ids", "7 8", "--max-new-tokens", "6")
    model = hugging_face_model(model_dir)
    for row, (prompt, line) in enumerate(zip([[5, 17, 42], [7, 8]], lines, strict=True)):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=1)
        assert line.split() == [f"[{row}]", *map(str, expected[0, len(prompt) :].tolist())]


def test_generate_text(capsys, model_dir_with_tokenizer):
    (text,) = generate(capsys, model_dir_with_tokenizer, "--prompt", "Hello", "--max-new-tokens", "8")
    assert text


def test_sampling_follows_the_seed(capsys, model_dir):
    arguments = ["--prompt-ids", "5,6,7", "--temperature", "1.5", "--max-new-tokens", "12", "--seed"]
    first, again, other = (generate(capsys, model_dir, *arguments, seed) for seed in "331")
    assert first == again
    assert first != other


def test_generation_stops_at_the_stop_token(capsys, tmp_path):
    greedy_dir, stopping_dir = tmp_path / "greedy", tmp_path / "stopping"
    write_checkpoint(greedy_dir, DEMO_CONFIG)
    arguments = ["--prompt-ids", "9,8,7", "--max-new-tokens", "8"]
    tokens = generate(capsys, greedy_dir, *arguments)[0].split()
    write_checkpoint(stopping_dir, DEMO_CONFIG | {"eos_token_id": int(tokens[3])})
    assert generate(capsys, stopping_dir, *arguments)[0].split() == tokens[: tokens.index(tokens[3]) + 1]
