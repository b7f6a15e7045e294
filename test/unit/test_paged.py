"""The paged-cache suite on the embedded runtime."""

from support.paged_suite import *  # noqa: F403
