"""How far a long run is: the value that callbacks get, and the bar that the command line draws of it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Bytes done of all bytes, seconds since the start. `resumed` bytes were done by an earlier run."""

    done: int
    total: int
    seconds: float
    resumed: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second of this run."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """infinity while nothing is done."""
        return (self.total - self.done) / self.rate if self.rate > 0 else float("inf")


ProgressCallback = Callable[[Progress], None]


class ProgressBar:
    """A callback that redraws one line on stderr; where that is no terminal, a line every ten percent."""

    def __init__(self, what: str):
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._drawn = float("-inf")
        self._tenth = 0

    def __call__(self, progress: Progress) -> None:
        finished = progress.done >= progress.total
        if self._terminal:
            if finished or time.monotonic() - self._drawn > 0.1:
                self._drawn = time.monotonic()
                sys.stderr.write(f"\r{self._line(progress)}\x1b[K" + ("\n" if finished else ""))
                sys.stderr.flush()
        elif 10 * progress.done // max(progress.total, 1) > self._tenth:
            self._tenth = 10 * progress.done // progress.total
            sys.stderr.write(self._line(progress) + "\n")

    def _line(self, progress: Progress) -> str:
        share = progress.done / max(progress.total, 1)
        bar = ("#" * round(20 * share)).ljust(20, ".")
        return (
            f"{self._what} [{bar}] {share:4.0%}  {format_bytes(progress.done)} of {format_bytes(progress.total)}  "
            f"{format_bytes(progress.rate)}/s  {format_seconds(progress.seconds_left)} left"
        )


def format_bytes(count: float) -> str:
    """Decimal units, as disks are sold: 1.5 GB is 1.5e9 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_seconds(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
