"""The bar: redrawn on a terminal, few lines in a log."""

import contextlib
import io

import pytest
from nxdi_deepseek.progress_bar import ByteBar, format_bytes, format_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(calls, stream, monkeypatch):
    """What the bar writes to `stream`; an error among the calls is raised between them."""
    monkeypatch.setattr("sys.stderr", stream)
    with contextlib.suppress(ValueError), ByteBar("shard") as progress:
        for call in calls:
            if isinstance(call, Exception):
                raise call
            progress(*call)
    return stream.getvalue()


def test_a_log_gets_few_lines(monkeypatch):
    text = drawn([(done, 10**9) for done in range(0, 10**9 + 1, 10**5)], io.StringIO(), monkeypatch)
    assert "\r" not in text
    first, last = text.splitlines()
    assert first.startswith("shard:   0%")
    assert last.startswith("shard: 100%")
    assert "1.00G/1.00G" in last


def test_a_terminal_gets_one_line_redrawn(monkeypatch):
    text = drawn([(0, 10**9), (10**9, 10**9)], Terminal(), monkeypatch)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "100%" in text


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_an_error_begins_on_a_line_of_its_own(monkeypatch, stream):
    assert drawn([(5, 10), ValueError()], stream(), monkeypatch).endswith("\n")


def test_a_run_that_did_nothing_prints_nothing(monkeypatch):
    assert drawn([], io.StringIO(), monkeypatch) == ""


def test_sizes_and_times():
    assert [format_bytes(n) for n in (0, 999, 1.5e9, 2.35e12)] == ["0.00B", "999B", "1.50GB", "2.35TB"]
    assert [format_seconds(s) for s in (5, 65, 3700)] == ["00:05", "01:05", "1:01:40"]
