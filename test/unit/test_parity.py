"""The model on the embedded runtime equals Hugging Face's."""

from support.parity_suite import *  # noqa: F403
