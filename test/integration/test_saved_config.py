"""The saved config on NxDI, which imports the classes that it finds there."""

from support import nxdi

nxdi.require_nxdi()

from support.saved_config_suite import *  # noqa: E402, F403
