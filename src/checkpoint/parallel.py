"""Threads that take items one after the other and hand back results; an error in one stops all."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from ..errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST = 1024
_AHEAD = 4  # items under way or waiting, per thread: a reader that pauses does not stop the threads at once


def thread_count(jobs: int | None) -> int:
    """`jobs`, or the cores that this process may use. Raises ConfigError for a number that no machine has."""
    if jobs is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= jobs <= _MOST:
        raise ConfigError(f"jobs {jobs} must be from 1 to {_MOST}; leave it out for one per core")
    return jobs


def run_threads(items: Iterable[Item], work: Callable[[Item], Result], jobs: int) -> Iterator[Result]:
    """Results of work(item) as they come. The first error is raised here, once what was under way has ended; no
    further item is begun after it, nor after the caller closed the iterator."""
    items = iter(items)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(work, item) for item in islice(items, _AHEAD * jobs)}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                waiting |= {pool.submit(work, item) for item in islice(items, len(done))}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
