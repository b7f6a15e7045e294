"""The paged-cache suite on real NxDI, in its CPU mode."""

from support import nxdi

nxdi.require_nxdi()

from support.paged_suite import *  # noqa: E402, F403
