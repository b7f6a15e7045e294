"""Heads that ranks do not divide, on real NxDI in its CPU mode."""

from support import nxdi

nxdi.require_nxdi()

from support.padded_heads_suite import *  # noqa: E402, F403
