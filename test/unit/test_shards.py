"""The suite of caches that ranks share by sequence, on the embedded runtime."""

from support.shard_suite import *  # noqa: F403
