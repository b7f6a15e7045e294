"""Prompts of the command line: tokenizers of every kind, chat templates, the token that begins a sequence."""

import json

import pytest
from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import ConfigError
from nxdi_deepseek.example_configs import DEMO_CONFIG
from nxdi_deepseek.third_party import encode, load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


def make_tokenizer(add_bos=True, chat_template=TEMPLATE):
    """One token per byte; puts BOS in front of a text, as DeepSeek's tokenizers do."""
    vocab = {BOS: 0, EOS: 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=chat_template
    )


@pytest.fixture
def model_dir(tmp_path):
    write_checkpoint(tmp_path, DEMO_CONFIG)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def run(capsys, model_dir, *arguments):
    """Exit status, output and error of `generate`."""
    arguments = arguments or ("--prompt", "hi")
    status = main(["generate", str(model_dir), "--max-new-tokens", "2", "--dtype", "float32", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("text", ["ab", BOS + "ab"])
def test_one_token_begins_the_sequence(add_bos, text):
    tokenizer = make_tokenizer(add_bos)
    ids = encode(tokenizer, text)
    assert ids.count(0) == (1 if add_bos or text.startswith(BOS) else 0)
    assert ids[ids.count(0) :] == encode(make_tokenizer(False), "ab")


@pytest.mark.parametrize("add_bos", [True, False])
def test_chat_is_the_template_around_one_message_of_the_user(add_bos):
    tokenizer = make_tokenizer(add_bos)
    assert tokenizer.decode(encode(tokenizer, "Hi!", chat=True)) == f"{BOS}[user]Hi![assistant]"


def test_chat_generates(capsys, model_dir):
    status, plain, _ = run(capsys, model_dir)
    assert status == 0
    assert run(capsys, model_dir, "--prompt", "hi", "--chat")[0] == 0
    assert run(capsys, model_dir, "--prompt", BOS + "hi")[1] == plain


def break_template(model_dir):
    for path in (model_dir / "chat_template.jinja", model_dir / "tokenizer_config.json"):
        if path.name.endswith("jinja") and path.exists():
            path.write_text("{% for %}")
        elif "chat_template" in path.read_text():
            edit_json(path, chat_template="{% for %}")


def remove_template(model_dir):
    make_tokenizer(chat_template=None).save_pretrained(model_dir)
    (model_dir / "chat_template.jinja").unlink(missing_ok=True)


def write(name, text):
    return lambda model_dir: (model_dir / name).write_text(text)


def own_code(model_dir):
    """A tokenizer as Kimi and Moonlight bring it along."""
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit_json(model_dir / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    (model_dir / "tokenizer.json").rename(model_dir / "own.json")
    (model_dir / "tiktoken.model").write_text("")
    (model_dir / "tokenization_own.py").write_text(
        "import os\n"
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, folder, *args, **kwargs):\n"
        "        path = os.path.join(folder, 'own.json')\n"
        "        return PreTrainedTokenizerFast(tokenizer_file=path, bos_token='<s>', eos_token='</s>')\n"
    )


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 7847602\n"
DAMAGES = {
    "own code": (own_code, [], "code of its own; read it, then add --trust-remote-code"),
    "own code that fails": (
        lambda d: (own_code(d), (d / "tokenization_own.py").write_text("import nowhere_to_be_found")),
        ["--trust-remote-code"],
        "the tokenizer cannot be loaded",
    ),
    "Git LFS pointer": (write("tokenizer.json", LFS), [], "is a Git LFS pointer"),
    "empty tokenizer": (write("tokenizer.json", ""), [], "the tokenizer cannot be loaded"),
    "foreign tokenizer": (write("tokenizer.json", '{"model": {"type": "Odd"}}'), [], "the tokenizer cannot be loaded"),
    "tokenizer_config that is no JSON": (write("tokenizer_config.json", "{"), [], "tokenizer_config.json: cannot be"),
    "tokenizer_config of a list": (write("tokenizer_config.json", "[]"), [], "tokenizer_config.json: cannot be"),
    "no chat template": (remove_template, ["--chat"], "has no chat template; leave --chat out"),
    "broken chat template": (break_template, ["--chat"], "the chat template fails"),
    "empty generation_config": (write("generation_config.json", ""), [], "generation_config.json: cannot be used"),
    "generation_config of a list": (write("generation_config.json", "[]"), [], "generation_config.json: cannot be"),
    "stop token as text": (write("generation_config.json", '{"eos_token_id": "1"}'), [], "eos_token_id '1' is not a"),
    "stop tokens as text": (write("generation_config.json", '{"eos_token_id": ["1"]}'), [], "is not a token id"),
    "penalty as text": (write("generation_config.json", '{"repetition_penalty": "much"}'), [], "penalty"),
    "length as text": (write("generation_config.json", '{"min_length": "long"}'), [], "generate"),
    "beams": (write("generation_config.json", '{"num_beams": 4}'), [], "beam_search is not supported"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_beside_the_weights_are_one_line(capsys, model_dir, name):
    damage, arguments, message = DAMAGES[name]
    damage(model_dir)
    status, _, error = run(capsys, model_dir, "--prompt", "hi", *arguments)
    lines = [line for line in error.splitlines() if line.startswith("nxdi-deepseek")]
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


def test_own_code_runs_when_trusted(capsys, model_dir):
    plain = run(capsys, model_dir)
    own_code(model_dir)
    assert run(capsys, model_dir, "--prompt", "hi", "--trust-remote-code")[:2] == plain[:2]
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load_tokenizer(str(model_dir))


BAD_VALUES = {
    "--top-k": ["-1", "1.5", "many"],
    "--top-p": ["0", "2", "nan", "-0.1"],
    "--temperature": ["-1", "nan", "inf"],
    "--seed": ["-1", str(2**32)],
    "--max-new-tokens": ["0", "-3", "9999999"],
    "--seq-len": ["0", "99999999"],
    "--tp-degree": ["0", "-1"],
    "--prompt-ids": ["-1", "512", "1.5", ""],
    "--dtype": ["float8"],
}


@pytest.mark.parametrize(
    "option, value", [(option, value) for option, values in BAD_VALUES.items() for value in values]
)
def test_values_of_the_command_line(capsys, model_dir, option, value):
    prompt = [] if option == "--prompt-ids" else ["--prompt-ids", "5"]
    arguments = ["--max-new-tokens", "2"] if option != "--max-new-tokens" else []
    assert main(["generate", str(model_dir), *prompt, *arguments, option + "=" + value]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "text, message", [("", "a prompt is empty"), ("once upon a time " * 600, "positions are needed")]
)
def test_demo_prompts_that_cannot_work(capsys, text, message):
    assert main(["demo", "--prompt", text]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize("world_size", ["two", "2"])
def test_processes_that_torchrun_did_not_start(capsys, model_dir, monkeypatch, world_size):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    status, _, error = run(capsys, model_dir, "--prompt-ids", "5", "--tp-degree", "2")
    assert status == 2
    assert error.count("\n") == 1
    assert "torchrun" in error
