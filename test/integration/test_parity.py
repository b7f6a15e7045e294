"""The model on real NxDI, in its CPU mode, equals Hugging Face's."""

from support import nxdi

nxdi.require_nxdi()

from support.parity_suite import *  # noqa: E402, F403
