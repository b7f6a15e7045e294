"""NxDI's own inference_demo, with DeepSeek-V3 among its model types."""

import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..errors import ConfigError
from .registration import INFERENCE_DEMO, register


def main(argv: Sequence[str] | None = None) -> None:
    """Runs inference_demo on `argv`, by default this process's arguments. Raises ConfigError where NxDI is missing."""
    if importlib.util.find_spec(INFERENCE_DEMO.partition(".")[0]) is None:
        raise ConfigError(
            "inference-demo is a part of neuronx_distributed_inference, which is not installed; `nxdi-deepseek "
            "without-sdk nxdi-deepseek inference-demo ...` uses its source on the CPU"
        )
    register()
    inference_demo = importlib.import_module(INFERENCE_DEMO)
    _allow_generate_outputs()
    sys.argv = ["nxdi-deepseek inference-demo", *(sys.argv[1:] if argv is None else argv)]
    with _comparing_all_tokens(inference_demo):
        inference_demo.main()


@contextmanager
def _comparing_all_tokens(inference_demo: ModuleType) -> Iterator[None]:
    """NxDI's logit matching compares the tokens that the expected outputs have, and passes however few these are."""
    check = inference_demo.check_accuracy_logits

    def check_lengths(model: Any, tokenizer: Any, *args: Any, **options: Any) -> Any:
        expected, asked = options.get("expected_logits"), options.get("num_tokens_to_check")
        if expected is not None:
            room = model.neuron_config.seq_len - len(tokenizer(options["prompt"]).input_ids)
            if len(expected) != room if asked is None else len(expected) < min(asked, room):
                raise ConfigError(
                    f"--expected-outputs-path holds {len(expected)} tokens and the run makes {asked or room}; make "
                    f"outputs of that length, or compare {min(len(expected), room)} of them by --num-tokens-to-check"
                )
        return check(model, tokenizer, *args, **options)

    inference_demo.check_accuracy_logits = check_lengths
    try:
        yield
    finally:
        inference_demo.check_accuracy_logits = check


def _allow_generate_outputs() -> None:
    """Lets torch.load read what transformers' generate returns, the format of --expected-outputs-path.

    inference_demo calls torch.load with its defaults. Since torch 2.6 these build no class but a few of torch's, so a
    plain OrderedDict takes the place of the output class: its fields arrive as items and as attributes.
    """
    import torch

    output_class = "transformers.generation.utils.GenerateDecoderOnlyOutput"
    torch.serialization.add_safe_globals([(_generate_output, output_class)])


def _generate_output(*_: Any) -> OrderedDict:
    return OrderedDict()


if __name__ == "__main__":
    from ..cli import main as cli_main

    sys.exit(cli_main(["inference-demo", *sys.argv[1:]]))
