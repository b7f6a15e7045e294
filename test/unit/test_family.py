"""Every member of the family on the embedded runtime equals its own judge."""

from support.family_suite import *  # noqa: F403
