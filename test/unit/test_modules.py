"""The modules on the embedded runtime."""

from support.module_suite import *  # noqa: F403
