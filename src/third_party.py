"""Third-party code on a user's files and arguments: whatever it raises becomes one line of ours."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, DeepseekError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")
_GIT_LFS = b"version https://git-lfs"
_LONGEST = 300


@contextmanager
def told(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions (all, or those of `kinds`) into ConfigError `what: the reason`, on one line."""
    try:
        yield
    except DeepseekError:
        raise
    except Exception as error:
        if kinds and not isinstance(error, kinds):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError | AttributeError | TypeError):
            reason = f"{type(error).__name__}: {reason}"
        raise ConfigError(f"{what}: {reason[:_LONGEST]}") from error


def started_by_torchrun(variable: str = "WORLD_SIZE") -> int:
    """The number of processes that torchrun started, 1 without it. Raises ConfigError."""
    with told(f"{variable} is not torchrun's", ValueError):
        return int(os.environ.get(variable, "1"))


def load_tokenizer(model_dir: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Its own Python code runs only with trust_remote_code. Raises ConfigError."""
    folder = Path(model_dir)
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        raise ConfigError(f"{model_dir}: has no tokenizer; give token ids with --prompt-ids 5,17,42")
    for path in files:
        with path.open("rb") as file:
            if file.read(len(_GIT_LFS)) == _GIT_LFS:
                raise ConfigError(f"{path}: is a Git LFS pointer, not the file; run `git lfs pull` in {model_dir}")
    if not trust_remote_code:
        _refuse_own_code(folder)
    with told(f"{model_dir}: the tokenizer cannot be loaded"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)


def _refuse_own_code(folder: Path) -> None:
    """Ahead of transformers, which may take another tokenizer in silence."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    with told(f"{path}: cannot be read as JSON"):
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map")
    if auto_map:
        raise ConfigError(f"{folder}: the tokenizer has code of its own; read it, then add --trust-remote-code")


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt; with `chat`, of the chat template around it as the user's message.

    The beginning-of-sequence token stands there once, also where the text or the template brings it along.
    Raises ConfigError.
    """
    if not text:
        raise ConfigError("a prompt is empty; give at least one character")
    if chat:
        text = apply_chat_template(tokenizer, text)
    with told("the tokenizer fails on the prompt"):
        plain = list(tokenizer(text, add_special_tokens=False).input_ids)
        bos = tokenizer.bos_token_id
        if chat or (bos is not None and plain[:1] == [bos]):
            return plain
        return list(tokenizer(text).input_ids)


def apply_chat_template(tokenizer: "PreTrainedTokenizerBase", message: str) -> str:
    """The conversation of one user message, up to where the assistant's answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--chat: the tokenizer has no chat template; leave --chat out")
    with told("--chat: the chat template fails"):
        conversation = [{"role": "user", "content": message}]
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def load_generation_config(model_dir: str) -> "GenerationConfig | None":
    """generation_config.json where there is one. Raises ConfigError."""
    path = Path(model_dir) / "generation_config.json"
    if not path.exists():
        return None
    with told(f"{path}: cannot be used"):
        from transformers import GenerationConfig

        config = GenerationConfig.from_pretrained(model_dir)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise ConfigError(f"{path}: {name} {value!r} is not a token id")
    return config
