"""The model on the graphs that NxDI would compile equals Hugging Face's."""

from support.parity_suite import *  # noqa: F403
