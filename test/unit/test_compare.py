"""The comparison on the embedded runtime: the model passes, planted faults are found."""

from support.compare_suite import *  # noqa: F403
