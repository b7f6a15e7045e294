"""The suite of caches that ranks share by sequence, on real NxDI in its CPU mode."""

from support import nxdi

nxdi.require_nxdi()

from support.shard_suite import *  # noqa: E402, F403
