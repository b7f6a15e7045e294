"""Whether what is about to be built fits in this machine's memory."""

import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError
from .third_party import started_by_torchrun

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raises ConfigError when `what` with its `needed` bytes cannot fit, before the system kills the process."""
    limit = memory_limit()
    if needed > limit:
        raise ConfigError(
            f"{what} needs {needed / 2**30:.1f} GiB of memory, and this process may use {limit / 2**30:.1f}; {remedy}"
        )


def memory_limit() -> int:
    """Bytes that this process may use: the machine's memory, or the limit of its container (cgroup), shared out among
    the processes that torchrun started on this machine."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits()]) // started_by_torchrun("LOCAL_WORLD_SIZE")


def _cgroup_limits() -> Iterator[int]:
    """The limits of this process's group and of the groups around it, of cgroups version 2 and 1."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                limit = (folder / file).read_text().strip()
            except OSError:
                continue
            if limit.isdigit():  # else "max"
                yield int(limit)
