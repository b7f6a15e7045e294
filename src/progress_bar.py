"""The progress bar of long commands, and sizes and times as people read them."""

import sys
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0  # where each state of the bar is a line of a log


class ByteBar:
    """A progress callback (done_bytes, total_bytes) that draws a bar on stderr; use it in a `with` block.

    The rate counts from the first call on, so that what an earlier run did is not in it. Where stderr is no terminal,
    the bar is a line at the start, one a minute and one at the end.
    """

    def __init__(self, what: str):
        self._what = what
        self._bar: tqdm | None = None

    def __enter__(self) -> "ByteBar":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            kind, seconds = (tqdm, 0.1) if sys.stderr.isatty() else (_Lines, _SECONDS_BETWEEN_LINES)
            self._bar = kind(
                desc=self._what,
                initial=done,
                total=total,
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                mininterval=seconds,
                maxinterval=seconds,
            )
        self._bar.update(done - self._bar.n)


class _Lines(tqdm):
    """Writes each state on a line of its own."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write((msg or str(self)) + "\n")
        return True


def format_bytes(count: float) -> str:
    """Decimal units, as disks are sold: 1.50GB is 1.5e9 bytes."""
    return tqdm.format_sizeof(count, "B")


def format_seconds(seconds: float) -> str:
    """1:02:03, or 02:03."""
    return tqdm.format_interval(seconds)
