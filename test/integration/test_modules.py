"""The modules on real NxDI, in its CPU mode."""

from support import nxdi

nxdi.require_nxdi()

from support.module_suite import *  # noqa: E402, F403
