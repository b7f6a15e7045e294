"""Every member of the family on real NxDI, in its CPU mode, equals its own judge."""

from support import nxdi

nxdi.require_nxdi()

from support.family_suite import *  # noqa: E402, F403
