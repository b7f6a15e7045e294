"""NxDI's own inference_demo, with DeepSeek-V3 among its model types."""

import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Sequence
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
    inference_demo.main()


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
