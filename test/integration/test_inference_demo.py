"""NxDI's own inference_demo, through our command, on the CPU, judged by Hugging Face.

Most run in this process, since importing NxDI takes seconds; those about exit status and start-up in one of their own.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import nxdi
from transformers.generation import GenerateDecoderOnlyOutput

nxdi.require_nxdi()

from nxdi_deepseek import cli  # noqa: E402
from nxdi_deepseek.accuracy.reference import hugging_face_model  # noqa: E402
from nxdi_deepseek.example_configs import RELEASED_CONFIG  # noqa: E402
from nxdi_deepseek.integrations.registration import INFERENCE_DEMO, register  # noqa: E402
from nxdi_deepseek.weight_forms import FORMS  # noqa: E402
from nxdi_deepseek.without_sdk.environment import cpu_environment  # noqa: E402
from support.checkpoints import words, write_served_checkpoint  # noqa: E402
from support.dequantized import parts_of, write_dequantized  # noqa: E402

PROMPT = [5, 17, 42, 9, 88]
OTHER_PROMPT = [7, 3]
SEQ_LEN = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_served_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def hf_model(checkpoint):
    return hugging_face_model(checkpoint)


def generate(hf_model, prompt):
    options = {"max_length": SEQ_LEN, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    return hf_model.generate(torch.tensor([prompt]), **options)


@pytest.fixture(scope="module")
def expected_outputs(hf_model, tmp_path_factory):
    """The file that --expected-outputs-path takes: what Hugging Face's generate returns, without its cache."""
    output = generate(hf_model, PROMPT)
    path = tmp_path_factory.mktemp("expected") / "outputs.pt"
    torch.save(GenerateDecoderOnlyOutput(sequences=output.sequences, scores=output.scores), path)
    return str(path)


@pytest.fixture(scope="module")
def damaged(checkpoint, tmp_path_factory):
    """The checkpoint with one element of one weight changed."""
    folder = tmp_path_factory.mktemp("damaged")
    write_served_checkpoint(folder)
    name = "model.layers.1.self_attn.o_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][7, 11] += 10
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture
def demo(monkeypatch, capsys):
    """Runs the command in this process: a function that returns its exit status and what it printed."""
    nxdi.init_cpu_parallel()
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(*arguments):
        status = cli.main(["inference-demo", *arguments])
        return status, *capsys.readouterr()

    return run


def run_process(module, *arguments):
    environment = cpu_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True)


def arguments_for(model, tmp_path, *options, prompts=(PROMPT,), model_type="deepseek_v3"):
    arguments = ["--model-type", model_type, "--task-type", "causal-lm", "run", "--on-cpu", "--torch-dtype", "float32"]
    arguments += ["--model-path", model, "--compiled-model-path", str(tmp_path / "compiled")]
    arguments += ["--batch-size", str(len(prompts)), "--seq-len", str(SEQ_LEN)]
    for prompt in prompts:
        arguments += ["--prompt", words(prompt)]
    return [*arguments, *options]


def generated(stdout):
    """The texts that inference_demo prints, prompts included."""
    return re.findall(r"^Output \d+: (.*)$", stdout, re.MULTILINE)


def check(mode, expected_outputs):
    return "--check-accuracy-mode", mode, "--expected-outputs-path", expected_outputs


def test_generates_what_hugging_face_does(checkpoint, hf_model, tmp_path):
    """A batch of unequal prompts, with buckets, one of them shorter than the sequence."""
    options = ("--enable-bucketing", "--max-context-length", "16")
    arguments = arguments_for(checkpoint, tmp_path, *options, prompts=(PROMPT, OTHER_PROMPT))
    result = run_process("nxdi_deepseek.cli", "inference-demo", *arguments)
    assert result.returncode == 0, result.stderr
    first, second = generated(result.stdout)
    assert first == words(generate(hf_model, PROMPT).sequences[0].tolist())
    # It ends where the longer prompt reaches seq_len.
    assert second == words(generate(hf_model, OTHER_PROMPT).sequences[0].tolist()[: len(second.split())])
    assert len(second.split()) == SEQ_LEN - len(PROMPT) + len(OTHER_PROMPT)


def test_logit_matching_passes(demo, checkpoint, expected_outputs, tmp_path):
    status, out, _ = demo(*arguments_for(checkpoint, tmp_path, *check("logit-matching", expected_outputs)))
    assert status == 0
    assert f"All {SEQ_LEN - len(PROMPT)} tokens passed validation" in out


def test_logit_matching_fails_when_a_weight_is_changed(damaged, expected_outputs, tmp_path):
    arguments = arguments_for(damaged, tmp_path, *check("logit-matching", expected_outputs))
    result = run_process("nxdi_deepseek.cli", "inference-demo", *arguments)
    assert result.returncode == 1, result.stderr
    assert "LogitMatchingValidationError" in result.stderr


@pytest.mark.parametrize("kept", [3, SEQ_LEN - len(PROMPT) - 1])
def test_expected_outputs_of_another_length_do_not_pass(demo, checkpoint, hf_model, tmp_path, kept):
    """NxDI alone would compare what is there and pass."""
    output = generate(hf_model, PROMPT)
    outputs = GenerateDecoderOnlyOutput(
        sequences=output.sequences[:, : len(PROMPT) + kept], scores=output.scores[:kept]
    )
    torch.save(outputs, tmp_path / "short.pt")
    options = check("logit-matching", str(tmp_path / "short.pt"))
    status, _, err = demo(*arguments_for(checkpoint, tmp_path, *options))
    assert status == 2
    assert f"holds {kept} tokens and the run makes {SEQ_LEN - len(PROMPT)}" in err.splitlines()[-1]
    status, _, err = demo(*arguments_for(checkpoint, tmp_path, *options, "--num-tokens-to-check", str(kept + 1)))
    assert status == 2
    assert f"holds {kept} tokens and the run makes {kept + 1}" in err.splitlines()[-1]
    status, out, _ = demo(*arguments_for(checkpoint, tmp_path, *options, "--num-tokens-to-check", str(kept)))
    assert status == 0
    assert f"All {kept} tokens passed validation" in out
    with pytest.raises((AssertionError, RuntimeError)):
        demo(*arguments_for(checkpoint, tmp_path, *check("token-matching", str(tmp_path / "short.pt"))))


def test_token_matching_passes(demo, checkpoint, expected_outputs, tmp_path):
    status, out, _ = demo(*arguments_for(checkpoint, tmp_path, *check("token-matching", expected_outputs)))
    assert status == 0
    assert "Checking accuracy by token matching" in out


def test_token_matching_fails_when_a_weight_is_changed(demo, damaged, expected_outputs, tmp_path):
    with pytest.raises(AssertionError, match="Expected \\(hf-cpu\\)"):
        demo(*arguments_for(damaged, tmp_path, *check("token-matching", expected_outputs)))


@pytest.mark.parametrize("chunk", [(), ("--max-context-length", "8")], ids=["one shot", "chunks"])
def test_logit_matching_of_a_cache_in_blocks(demo, checkpoint, tmp_path, chunk):
    prompt = [*PROMPT, *range(30, 38)]
    options = ("--enable-prefix-caching", "--enable-block-kv-layout", "--pa-block-size", "8", "--pa-num-blocks", "3")
    checked = ("--check-accuracy-mode", "logit-matching", "--num-tokens-to-check", "6")
    status, out, _ = demo(*arguments_for(checkpoint, tmp_path, *options, *chunk, *checked, prompts=(prompt,)))
    assert status == 0
    assert "All 6 tokens passed validation" in out


def test_kimi_k2(demo, tmp_path):
    """transformers has no class for its model_type. Without expected outputs the judge is load_hf_model."""
    kimi = write_served_checkpoint(tmp_path / "kimi", model_type="kimi_k2", n_group=1, topk_group=1)
    options = ("--check-accuracy-mode", "logit-matching", "--num-tokens-to-check", "6")
    status, out, _ = demo(*arguments_for(kimi, tmp_path, *options, model_type="kimi_k2"))
    assert status == 0
    assert "All 6 tokens passed validation" in out
    assert generated(out) == [words(generate(hugging_face_model(kimi), PROMPT).sequences[0].tolist())]


@pytest.mark.parametrize("weights", ["fp8", "fp8-block"])
def test_fp8_experts(demo, checkpoint, tmp_path, weights):
    """By NxDI's own options; Hugging Face on the dequantized experts is the judge."""
    kind = FORMS[weights].quantization_type
    status, out, _ = demo(*arguments_for(checkpoint, tmp_path, "--quantized", "--quantization-type", kind))
    assert status == 0
    folder = write_dequantized(tmp_path / "dequantized", checkpoint, parts_of(checkpoint, True, weights=weights))
    assert generated(out) == [words(generate(hugging_face_model(folder), PROMPT).sequences[0].tolist())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--enable-lora",), "neuron_config: lora_config"),
        (("--enable-prefix-caching",), "neuron_config: is_prefix_caching without is_block_kv_layout"),
        (("--enable-chunked-prefill", "--enable-block-kv-layout"), "neuron_config: is_chunked_prefill=True"),
        (("--quantized", "--quantized-checkpoints-path", "q"), "neuron_config: quantized=True needs weights"),
        (("--enable-bucketing", "--context-encoding-buckets", "8", "16"), "context_encoding_buckets end at 16"),
        (("--batch-size", "2", "--kv-cache-batch-size", "1"), "kv_cache_batch_size 1 is not tkg_batch_size 2"),
        (("--max-context-length", "4"), "prompt of 5 tokens exceeds max_context_length 4"),
        (("--prompt", "w3", "--prompt", "w4"), "batch of 3 sequences exceeds batch_size 1"),
    ],
)
def test_what_cannot_work_is_one_line(demo, checkpoint, tmp_path, options, message):
    status, _, err = demo(*arguments_for(checkpoint, tmp_path, *options))
    assert status == 2
    assert err.splitlines()[-1].startswith("nxdi-deepseek inference-demo: ")
    assert message in err.splitlines()[-1]


def test_help_is_that_of_nxdi():
    result = run_process("nxdi_deepseek.integrations.inference_demo", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: nxdi-deepseek inference-demo")
    assert re.search(r"--model-type \{llama,.*deepseek_v3", result.stdout)


@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp8-block"])
def test_the_line_that_plan_prints_parses(tmp_path, capsys, monkeypatch, weights):
    """NxDI's own parser takes it."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    arguments = ["plan", str(tmp_path), "--weights", weights, "--batch-size", "2", "--ctx-batch-size", "1"]
    assert cli.main([*arguments, "--format", "json"]) == 0
    _, program, command, *words = shlex.split(json.loads(capsys.readouterr().out)["commands"]["inference_demo"])
    assert (program, command) == ("nxdi-deepseek", "inference-demo")
    register()
    monkeypatch.setattr(sys, "argv", ["inference_demo", *words])
    args = importlib.import_module(INFERENCE_DEMO).parse_args()
    assert (args.tp_degree, args.batch_size, args.ctx_batch_size, args.seq_len) == (64, 2, 1, 512)
    assert args.quantized is (weights != "bf16")
    assert len(args.prompts) == 2
