"""Generation on the embedded runtime."""

from support.generation_suite import *  # noqa: F403
