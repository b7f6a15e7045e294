"""Types of command-line values, for argparse's `type=`, and a parser whose errors are ConfigErrors."""

import argparse
import math
from typing import NoReturn

from ..errors import ConfigError
from ..planning.shard_choice import AUTO
from ..weight_forms import BF16, FORMS

_LARGEST_SEED = 2**32 - 1  # numpy's bound, which transformers.set_seed keeps to


DEVICE_GRAPHS = "--device-graphs"


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError and leaves its usage, which may take many lines, to --help."""

    def error(self, message: str) -> NoReturn:
        option, colon, reason = message.removeprefix("argument ").partition(": ")
        message = f"{option} {reason}" if colon and message.startswith("argument ") else message
        raise ConfigError(f"{' '.join(message.split())} (see {self.prog} --help)")


def add_device_graphs(parser: argparse.ArgumentParser) -> None:
    """The cli reads the option itself, since it decides what a process imports, and so not when it is abbreviated."""
    parser.add_argument(
        DEVICE_GRAPHS,
        action="store_true",
        help="run the graphs that NxDI compiles for the device, all ranks in this process (`make graph-env`)",
    )
    parser.allow_abbrev = False


def file_name(text: str) -> str:
    """Of a file or folder. An empty one, of a shell variable that is not set, would be the folder that one is in."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file or folder")
    return text


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The form of routed experts, NeuronConfig's `weights`."""
    what = "; ".join(f"{form.name}: {form.what}" for form in FORMS.values())
    parser.add_argument(
        "--weights", choices=list(FORMS), default=BF16.name, help=f"routed experts on a rank: {what} (%(default)s)"
    )


def add_kv_seq_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-seq-shards",
        type=_shards,
        default=1,
        metavar="N",
        help="adjacent ranks that share each sequence's cache, 1, 4, 16 or 64; auto: what a step's bytes and "
        "collectives speak for (%(default)s)",
    )


def _shards(text: str) -> int | str:
    return text if text == AUTO else positive_int(text)


def positive_int(text: str) -> int:
    return _integer(text, 1)


def non_negative_int(text: str) -> int:
    return _integer(text, 0)


def seed(text: str) -> int:
    return _integer(text, 0, _LARGEST_SEED)


def probability(text: str) -> float:
    """Above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def positive_float(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative_float(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _integer(text: str, smallest: int, largest: int = 2**31 - 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < smallest:
        raise argparse.ArgumentTypeError(f"{text} must be at least {smallest}")
    if value > largest:
        raise argparse.ArgumentTypeError(f"{text} must be at most {largest}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value
