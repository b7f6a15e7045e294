"""FP8 experts on the embedded runtime."""

from support.fp8_suite import *  # noqa: F403
