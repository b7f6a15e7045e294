"""vLLM with its Neuron plugin and NxDI's CPU mode, judged by Hugging Face's greedy tokens.

Needs an environment with vllm, vllm-neuron and this package installed: VLLM_NEURON_PYTHON names its interpreter.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import nxdi_deepseek
import pytest
import torch
from safetensors import safe_open
from support import nxdi

PYTHON = os.environ.get("VLLM_NEURON_PYTHON")
if not PYTHON:
    pytest.skip("no vLLM: VLLM_NEURON_PYTHON does not name its interpreter", allow_module_level=True)
nxdi.require_nxdi()

from nxdi_deepseek.accuracy.reference import hugging_face_model  # noqa: E402
from nxdi_deepseek.family import ARCHITECTURES  # noqa: E402
from nxdi_deepseek.without_sdk.environment import cpu_environment  # noqa: E402
from support.checkpoints import words, write_served_checkpoint  # noqa: E402
from support.dequantized import parts_of, write_dequantized  # noqa: E402
from support.members import ALL, write_member  # noqa: E402
from support.models import random_prompts  # noqa: E402

NEW_TOKENS = 12
PROMPTS = [[5, 17, 42, 9, 88], [7], [100, 200, 300, 400, 500, 600, 700, 800, 900], [33, 44], [3] * 30]
START_SECONDS = 180


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_served_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Hugging Face's greedy tokens, every prompt alone."""
    model = hugging_face_model(checkpoint)
    return [generate(model, prompt) for prompt in PROMPTS]


def generate(model, prompt):
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0, len(prompt) :].tolist()


def engine(model, **arguments):
    return {
        "model": model,
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 3,
        "enable_prefix_caching": False,
        "additional_config": {"override_neuron_config": {"on_cpu": True}},
    } | arguments


def environment(**variables):
    # Compiling Python to kernels has no use here and takes longer than the tests.
    return cpu_environment() | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"} | variables


def run_offline(tmp_path, engine, prompts, **variables):
    script = pathlib.Path(nxdi.__file__).with_name("vllm_generate.py")
    output = tmp_path / "tokens.json"
    job = {"engine": engine, "prompts": prompts, "new_tokens": NEW_TOKENS, "output": str(output)}
    result = subprocess.run(
        [PYTHON, script], input=json.dumps(job), env=environment(**variables), capture_output=True, text=True
    )
    return json.loads(output.read_text()) if output.exists() else None, result.stdout + result.stderr


REGISTRATION = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
print([name for name in ("neuronx_distributed_inference", "nxdi_deepseek.modeling_deepseek") if name in sys.modules])
from vllm_neuron.worker import neuronx_distributed_model_loader as loader
from nxdi_deepseek.family import ARCHITECTURES
from nxdi_deepseek.integrations.vllm import register_model
for _ in range(2):
    for architecture in (*ARCHITECTURES, "LlamaForCausalLM"):
        print(loader._get_neuron_model_cls(architecture).__name__)
    register_model()
"""


def test_registration_in_the_plugins_own_table():
    """vLLM's start imports nothing of NxDI; the plugin's loader, once imported, finds the model, however often."""
    result = subprocess.run([PYTHON, "-c", REGISTRATION], env=environment(), capture_output=True, text=True)
    printed = [line for line in result.stdout.splitlines() if line.startswith(("[", "Neuron"))]
    classes = len(ARCHITECTURES) * ["NeuronDeepseekV3ForCausalLM"] + ["NeuronLlamaForCausalLM"]
    assert printed == ["[]", *classes, *classes], result.stdout + result.stderr


CONFIGS = """
import sys
from vllm.engine.arg_utils import EngineArgs
for folder in sys.argv[1:]:
    engine = EngineArgs(folder, dtype="float32", max_model_len=64, enable_prefix_caching=False, tensor_parallel_size=3)
    config = engine.create_engine_config().model_config
    print("heads:", config.architecture, config.hf_text_config.num_attention_heads)
"""


def test_a_config_of_every_member_starts_an_engine(tmp_path):
    """In one process. 8 heads on 3 ranks, which vLLM alone refuses, are 9. Mistral's wrapper stays vLLM's own."""
    served = {name: config for name, config in ALL.items() if config["architectures"][0] in ARCHITECTURES}
    assert ALL.keys() - served.keys() == {"Mistral-Small-4"}
    for name in served:
        write_member(tmp_path / name, name, seed=0)
    command = [PYTHON, "-c", CONFIGS, *(tmp_path / name for name in served)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    printed = [line for line in result.stdout.splitlines() if line.startswith("heads: ")]
    assert printed == [f"heads: {config['architectures'][0]} 9" for config in served.values()], result.stderr


@pytest.mark.parametrize(
    "override",
    [{}, {"enable_bucketing": False}, {"on_device_sampling_config": None}],
    ids=["defaults", "no buckets", "sampling on the host"],
)
def test_offline_batch_of_unequal_prompts(tmp_path, checkpoint, expected, override):
    config = {"override_neuron_config": {"on_cpu": True} | override}
    tokens, log = run_offline(tmp_path, engine(checkpoint, additional_config=config), PROMPTS)
    assert tokens == expected, log


def test_fp8_experts(tmp_path, checkpoint):
    """By one word. Hugging Face on the dequantized experts is the judge."""
    config = {"override_neuron_config": {"on_cpu": True, "weights": "fp8"}}
    tokens, log = run_offline(tmp_path, engine(checkpoint, additional_config=config), PROMPTS)
    judge = write_dequantized(tmp_path / "dequantized", checkpoint, parts_of(checkpoint, True, weights="fp8"))
    model = hugging_face_model(judge)
    assert tokens == [generate(model, prompt) for prompt in PROMPTS], log
    assert "quantized_checkpoints_path is not used" in log


def test_artifacts_are_used_again(tmp_path, checkpoint, expected):
    """The second start knows the model from the saved config alone: it is given other overrides, and ignores them."""
    artifacts = {"NEURON_COMPILED_ARTIFACTS": str(tmp_path / "artifacts")}
    first, log = run_offline(tmp_path, engine(checkpoint), PROMPTS, **artifacts)
    assert first == expected, log
    (tmp_path / "tokens.json").unlink()
    saved = (tmp_path / "artifacts" / "neuron_config.json").read_text()
    other = {"override_neuron_config": {"on_cpu": True, "enable_bucketing": False}}
    again, log = run_offline(tmp_path, engine(checkpoint, additional_config=other), PROMPTS, **artifacts)
    assert again == expected, log
    assert "override_neuron_config will be ignored" in log
    assert (tmp_path / "artifacts" / "neuron_config.json").read_text() == saved


@pytest.mark.parametrize("lengths", [{}, {"max_context_length": 16}], ids=["in one piece", "in chunks of 16"])
def test_prefix_caching(tmp_path, checkpoint, lengths):
    """Prompts that begin alike: found blocks, from none to all of a prompt, change no token. Then from artifacts."""
    (base,) = random_prompts((40,), vocab_size=900)
    prompts = [base, base[:30] + [5, 6, 7], base[:24], base, [9], base[:16] + list(range(20, 50)), [*base, 3]]
    model = hugging_face_model(checkpoint)
    config = {"override_neuron_config": {"on_cpu": True} | lengths}
    blocks = {"enable_prefix_caching": True, "block_size": 8, "num_gpu_blocks_override": 24}
    artifacts = {"NEURON_COMPILED_ARTIFACTS": str(tmp_path / "artifacts")}
    for _ in range(2):
        tokens, log = run_offline(
            tmp_path, engine(checkpoint, additional_config=config, **blocks), prompts, **artifacts
        )
        assert tokens == [generate(model, prompt) for prompt in prompts], log
        assert json.loads((tmp_path / "tokens.cached").read_text()) == [0, 24, 16, 32, 0, 16, 40]
        (tmp_path / "tokens.json").unlink()


def test_kimi_k2(tmp_path):
    """Neither vLLM nor transformers knows this model_type and architecture."""
    kimi = write_served_checkpoint(
        tmp_path / "kimi", architectures=["KimiK2ForCausalLM"], model_type="kimi_k2", n_group=1, topk_group=1
    )
    model = hugging_face_model(kimi)
    tokens, log = run_offline(tmp_path, engine(kimi), PROMPTS[:2])
    assert tokens == [generate(model, prompt) for prompt in PROMPTS[:2]], log


def test_released_format(tmp_path):
    """FP8 blocks with scales and an MTP layer: the small shipped model, judged by its golden tokens."""
    folder = pathlib.Path(nxdi_deepseek.__file__).parent / "data" / "tiny_deepseek_v3"
    with safe_open(folder / "golden.safetensors", "pt") as file:
        ids, lengths, tokens = map(file.get_tensor, ("prompt_ids", "prompt_lengths", "tokens"))
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True) if length <= 64 - NEW_TOKENS]
    # Else the plugin writes into the model's folder.
    artifacts = {"NEURON_COMPILED_ARTIFACTS": str(tmp_path / "artifacts")}
    generated, log = run_offline(tmp_path, engine(str(folder)), prompts, **artifacts)
    assert generated == tokens[lengths <= 64 - NEW_TOKENS, :NEW_TOKENS].tolist(), log


OVERRIDES = {"on_cpu": True, "seq_len": 64, "max_context_length": 32, "batch_size": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_prefix_caching": True}, "enable_prefix_caching without num_gpu_blocks_override is not supported"),
        ({"enable_lora": True}, "enable_lora is not supported"),
        (
            {"additional_config": {"override_neuron_config": OVERRIDES}},
            "max_model_len 64 exceeds max_context_length 32",
        ),
        (
            {"max_model_len": 32, "additional_config": {"override_neuron_config": OVERRIDES}},
            "max_num_seqs 3 exceeds batch_size 2 of override_neuron_config; lower max_num_seqs",
        ),
        ({"tensor_parallel_size": 2}, "tp_degree 2 needs as many processes"),
    ],
    ids=["prefix caching", "LoRA", "long prompts", "many sequences", "tensor parallel in one process"],
)
def test_what_cannot_work_stops_the_start(tmp_path, checkpoint, arguments, message):
    tokens, log = run_offline(tmp_path, engine(checkpoint, **arguments), PROMPTS)
    assert tokens is None
    assert message in log


def test_heads_that_ranks_do_not_divide_are_no_reason_to_refuse(tmp_path):
    """vLLM alone says that 5 must be divisible by 2. What stops it is the CPU mode's single process."""
    model = write_served_checkpoint(tmp_path / "model", num_attention_heads=5)
    tokens, log = run_offline(tmp_path, engine(model, tensor_parallel_size=2), PROMPTS[:1])
    assert tokens is None
    assert "tp_degree 2 needs as many processes" in log


CACHES = {
    "unpaged": ["--no-enable-prefix-caching"],
    "in blocks": ["--enable-prefix-caching", "--block-size", "8", "--num-gpu-blocks-override", "16"],
}


@pytest.fixture(scope="module", params=CACHES)
def server(checkpoint, tmp_path_factory, request):
    """`vllm serve` on a free port: its address."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(pathlib.Path(PYTHON).with_name("vllm")), "serve", checkpoint, "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "2", *CACHES[request.param]]
    command += ["--additional-config", '{"override_neuron_config": {"on_cpu": true}}']
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(url, process, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


def post(server, **fields):
    body = {"prompt": None, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True} | fields
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=120)


def complete(server, prompt):
    with post(server, prompt=prompt) as response:
        return json.load(response)["choices"][0]["text"]


def test_completion(server, expected):
    assert complete(server, words(PROMPTS[0])).split() == words(expected[0]).split()


def test_streamed_completion(server, expected):
    with post(server, prompt=PROMPTS[2], stream=True) as response:
        events = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event)["choices"][0]["text"] for event in events]
    assert 1 < len(chunks) <= NEW_TOKENS  # a client that lags gets several tokens at once
    assert "".join(chunks).split() == words(expected[2]).split()


def test_concurrent_clients_get_their_own_answers(server, expected):
    """More clients than slots, with prompts and thus steps of different length."""
    rounds = 2
    with ThreadPoolExecutor(len(PROMPTS) * rounds) as clients:
        texts = list(clients.map(lambda prompt: complete(server, prompt), PROMPTS * rounds))
    assert [text.split() for text in texts] == [words(tokens).split() for tokens in expected] * rounds


def test_prompt_longer_than_the_model_is_refused_and_the_server_lives(server, expected):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        complete(server, [5] * 65)
    assert refusal.value.code == 400
    assert "has 65 input tokens" in refusal.value.read().decode()
    assert complete(server, PROMPTS[0]).split() == words(expected[0]).split()
