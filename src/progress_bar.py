"""The progress bar of long commands, and sizes and times as people read them."""

import sys
from types import TracebackType
from typing import TextIO

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
            terminal = sys.stderr.isatty()
            seconds = 0.1 if terminal else _SECONDS_BETWEEN_LINES
            self._bar = tqdm(
                desc=self._what,
                initial=done,
                total=total,
                unit="B",
                unit_scale=True,
                file=sys.stderr if terminal else _Log(sys.stderr),
                mininterval=seconds,
                maxinterval=seconds,
            )
        self._bar.update(done - self._bar.n)


class _Log:
    """A file that gets each state of the bar as a line of its own."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip() + "\n")

    def flush(self) -> None:
        self._file.flush()


def format_bytes(count: float) -> str:
    """Decimal units, as disks are sold: 1.50GB is 1.5e9 bytes."""
    return tqdm.format_sizeof(count, "B")


def format_seconds(seconds: float) -> str:
    """1:02:03, or 02:03."""
    return tqdm.format_interval(seconds)
