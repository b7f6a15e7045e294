"""`nxdi-deepseek inference-demo`: NxDI's inference_demo, every argument passed on."""

from collections.abc import Sequence

from ..integrations.inference_demo import main


def run_with_own_parser(argv: Sequence[str]) -> int:
    main(argv)
    return 0
