"""The saved config on the embedded runtime."""

from support.saved_config_suite import *  # noqa: F403
