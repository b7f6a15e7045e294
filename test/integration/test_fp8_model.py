"""FP8 experts on real NxDI, in its CPU mode."""

from support import nxdi

nxdi.require_nxdi()

from support.fp8_suite import *  # noqa: E402, F403
