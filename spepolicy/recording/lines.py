"""Lines of a kernel trace: what `cat /sys/kernel/tracing/trace`, `trace-cmd report` and `perf script` print, plain or
gzipped.

All print one event a line, with the same fields before the event's own text:

    ftrace      lvmm-252  [001] d....   217.738501: unmap_gfn: (kvm_unmap_gfn_range+0x0/0x50) start=0x41ca8 end=0x41ca9
    trace-cmd   lvmm-256  [001]   162.503818: unmap_gfn:            (fffface8d185f7e0) start=0x40000 end=0x4f800
    perf           lvmm   256 [001]   162.503818: kp:unmap_gfn: (fffface8d185f7e0) start=0x40000 end=0x4f800

perf names an event with its group, puts blanks between task and number, and a thread's number behind a slash if it was
asked for both. The function tracer's lines have no event name: `callee <-caller` (ftrace), `function: callee <--
caller` (trace-cmd).
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from spepolicy.errors import RecordingError

__all__ = ["LOST", "Line", "damaged", "fields", "numbered_lines", "parse"]


class Line(NamedTuple):
    """One event: who, when, which, and its text. `colon` is empty for a line of the function tracer."""

    comm: str
    task: str  # number of the thread
    seconds: str
    fraction: str  # of a second: six to nine digits
    name: str
    colon: str
    text: str


# The comm is at most 15 characters, of any kind (QEMU: "CPU 0/KVM"); "(tgid)" and the flags column are optional.
_EVENT = re.compile(
    r"\s*(?P<comm>.{1,16}?)-(?P<pid>\d+)\s+(?:\(\s*[\d-]+\)\s+)?\[\d+\]\s+(?:[^\s:]{4,6}\s+)?"
    r"(?P<seconds>\d+)\.(?P<fraction>\d{6,9}):\s+(?P<name>[^\s:]+)(?P<colon>:?)\s*(?P<text>.*)"
)
_PERF = re.compile(
    r"\s*(?P<comm>\S(?:.{0,15}?\S)?)\s+(?:\d+/)?(?P<pid>\d+)\s+\[\d+\]\s+(?P<seconds>\d+)\.(?P<fraction>\d{6,9}):\s+"
    r"(?:\d+\s+)?[\w-]+:(?P<name>[\w-]+)(?P<colon>:)\s*(?P<text>.*)"
)
LOST = re.compile(
    r"CPU:?\s*\d+\s+\[(?:LOST (?P<ftrace>\d+) EVENTS|(?P<tracecmd>\d+) EVENTS DROPPED|EVENTS DROPPED)\]"
    r"|PERF_RECORD_LOST\w*\s+lost\s+(?P<perf>\d+)"
)

_FIELD = re.compile(r"(?<!\S)(\w+)=(0x[0-9a-f]+|\d+)\b")
_BINARY = {
    b"\x17\x08\x44tracing": "a binary trace.dat of trace-cmd. Turn it into text: trace-cmd report -i FILE > LOG",
    b"PERFILE2": "a perf.data file. Turn it into text: perf script -i FILE > LOG",
    b"PK\x03\x04": "a zip archive. A compact recording must end in .npz",
}


def parse(line: str) -> Line | None:
    """Return what is in a line of any of the three forms, None if it is no event."""
    match = _EVENT.match(line) or _PERF.match(line)
    return Line(*match.groups()) if match else None


def damaged(path: Path, line: int, problem: str, expected: str, remedy: str) -> RecordingError:
    """Return the error for *path*: where, what is wrong, what was expected, what to do. Line 0 is the whole file."""
    where = f"{path}:{line}" if line else str(path)
    return RecordingError(f"{where}: {problem}. Expected {expected}. {remedy}")


def fields(text: str, names: tuple[str, ...]) -> list[int] | None:
    """Return the values of `name=value` fields of a kprobe event in the order of *names*, None if one is missing."""
    found = dict(_FIELD.findall(text))
    try:
        return [int(found[name], 0) for name in names]
    except (KeyError, ValueError):
        return None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a text file, gzipped or not. Raise RecordingError if it is not text."""
    number = 0
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            stream: gzip.GzipFile | io.BufferedReader = gzip.GzipFile(fileobj=raw) if packed else raw
            _refuse_binary(path, stream.peek(4096)[:4096])
            for line in io.TextIOWrapper(stream, encoding="utf-8", errors="replace"):
                number += 1
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the gzip stream is damaged ({error})"
        remedy = f"Copy it again; what is complete can be saved with: gzip -dc {path.name} > LOG"
        raise damaged(path, number + 1, problem, "a complete .gz file", remedy) from error
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise damaged(path, 0, problem, "a kernel trace as text", "Check the path and its permissions.") from error


def _refuse_binary(path: Path, head: bytes) -> None:
    expected = "kernel trace text (ftrace, trace-cmd report or perf script)"
    if not head:
        remedy = "Was tracing on, and was the buffer copied before it was cleared?"
        raise damaged(path, 0, "the file is empty", expected, remedy)
    for magic, what in _BINARY.items():
        if head.startswith(magic):
            raise damaged(path, 0, "not text", expected, f"This is {what}.")
    if b"\0" in head:
        raise damaged(path, 1, "not text: the first 4096 bytes hold a NUL byte", expected, "Check the file.")
