"""Threads that take items from one line and hand back results; an error in one stops all."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_threads(items: Iterator[Item], work: Callable[[Item], Result], jobs: int) -> Iterator[Result]:
    """Results of work(item) as they come. A worker's exception is raised here, after all workers stopped."""
    lock, stop = threading.Lock(), threading.Event()
    results: queue.Queue = queue.Queue(maxsize=4 * jobs)

    def worker() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(items)
                results.put((work(item), None))
        except StopIteration:
            results.put((None, None))
        except BaseException as error:
            results.put((None, error))

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    running = jobs
    try:
        while running:
            result, error = results.get()
            if error is not None:
                raise error
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        stop.set()
        while any(thread.is_alive() for thread in threads):
            # A worker may wait for room to put its last result.
            try:
                results.get(timeout=0.05)
            except queue.Empty:
                continue
