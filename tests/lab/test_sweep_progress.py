"""The progress bar of a sweep: what a terminal shows, and that nothing else is written to."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from spepolicy.lab.sweep.progress import Progress

from .sweeps import SWEEP, Run

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal whose other end keeps what is written to it."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.stream: TextIO = os.fdopen(slave, "w")
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._master, 4096):
                self._shown += part
        except OSError:  # EIO: nobody has the terminal open any more
            return

    def text(self) -> str:
        """Close it, and return what was shown, without colours and movements."""
        self.stream.close()
        self._reader.join(timeout=10)
        os.close(self._master)
        return ESCAPES.sub("", self._shown.decode())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 120 columns. A test must make it standard error itself: pytest sets that anew after fixtures."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    there = Terminal()
    yield there
    monkeypatch.undo()
    if not there.stream.closed:
        there.text()


def test_a_terminal_shows_lanes_speed_time_left_and_failures(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar's clock goes on by a second for every 100 lanes, so that 700 of 1,000 take 7 s more."""
    monkeypatch.setattr("sys.stderr", terminal.stream)
    clock = [1000.0]
    with Progress(900) as progress:
        progress._bar.get_time = lambda: clock[0]
        progress.more(100)
        progress.advance(0, 0)  # rich counts speed from the first update on
        for failed in (0, 0, 7):
            clock[0] += 1.0
            progress.advance(100, failed)
            progress._bar.refresh()
    lines = terminal.text().replace("\r", "\n")
    assert re.search(r"simulating .* 200/1000 +lanes, 100 a second, +0:00:08 left\s", lines), lines
    assert re.search(r"simulating .* 300/1000 +lanes, 100 a second, +0:00:07 left, 7 lanes failed", lines), lines


def test_what_is_no_terminal_stays_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with Progress(1000) as progress:
        progress.more(10)
        progress.advance(100, 3)
    assert log.getvalue() == ""


def test_an_error_ends_the_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread goes on drawing."""
    monkeypatch.setattr("sys.stderr", terminal.stream)
    before = threading.active_count()

    def interrupted() -> None:
        with Progress(10) as progress:
            progress.advance(1, 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert "1/10" in terminal.text()


def test_a_sweep_on_a_terminal_shows_its_lanes_and_leaves_its_output_alone(
    run: Run, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal.stream)
    status, out, _ = run(*SWEEP)
    assert status == 0
    shown = terminal.text()
    assert "24/24 lanes" in re.sub(r" +", " ", shown)
    assert "files: " not in shown
    assert "files: " in out
    assert "a second" not in out


def test_lines_for_a_file_do_not_go_to_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m spepolicy -m ... > log`: what is said while the bar is drawn belongs to the log."""
    monkeypatch.setattr("sys.stderr", terminal.stream)
    log = io.StringIO()
    monkeypatch.setattr("sys.stdout", log)
    with Progress(10) as progress:
        print("a line")
        progress.advance(1, 0)
    assert log.getvalue() == "a line\n"
    assert "a line" not in terminal.text()
