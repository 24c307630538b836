"""Read the file that plugin/recorder.c writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import RecordingError

__all__ = ["ACCESS", "COLUMNS", "Mapping", "Raw", "read_raw"]

COLUMNS = (
    "instructions",
    "load",
    "store",
    "atomic",
    "branch",
    "taken",
    "mispredict",
    "store_miss",
    "l2",
    "llc",
    "dram",
    "waits_l2",
    "waits_llc",
    "waits_dram",
    "leads_llc",
    "leads_dram",
    "walk",
)
"""Columns of the counts, as `enum column` of the plugin has them."""

_MAGIC = b"SPEREC2\n"
_HEAD = np.dtype([("instructions", "u8"), ("rows", "u4"), ("syscalls", "u4"), ("sampled", "u4"), ("nothing", "u4")])
_ROW = np.dtype([("line", "u8"), ("count", "u4", (len(COLUMNS),))], align=True)
_HEAP = np.dtype([("begin", "u8"), ("end", "u8")])
ACCESS = np.dtype(
    [
        ("line", "u8"),  # address of the code / 64
        ("address", "u8"),  # of the data
        ("load", "?"),  # or an atomic; else a store
        ("miss", "?"),  # of the L1
        ("by_stack_pointer", "?"),
        ("bytes_log2", "u1"),
        ("nothing", "u4"),
    ]
)
"""One access of a hundred or so: `struct sampled` of the plugin."""


@dataclass(frozen=True)
class Mapping:
    """A part of the memory of the program."""

    begin: int
    end: int
    file_offset: int
    path: str  # empty if no file is behind it


@dataclass(frozen=True)
class Raw:
    """Counts of a run, and a sample of its accesses. A row is for one interval and 64 bytes of code."""

    instructions: NDArray[np.int64]  # [intervals]
    syscalls: NDArray[np.int64]  # [intervals]
    interval: NDArray[np.int64]  # [rows]
    line: NDArray[np.uint64]  # [rows] address / 64
    count: NDArray[np.int64]  # [rows, COLUMNS]
    mappings: tuple[Mapping, ...]  # of files
    accesses: NDArray[Any]  # ACCESS[n]
    anonymous: tuple[Mapping, ...] = ()  # of no file
    heap: tuple[int, int] = (0, 0)  # from where to where brk() was moved


def read_raw(path: Path) -> Raw | None:
    """Return the counts of a run; None if nothing was executed.

    :raises RecordingError: if the file is not one of the plugin's, or ends early: then the emulator was killed.
    """
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise RecordingError(f"{path}: not a file of the recorder's plugin. Rule: it begins with {_MAGIC!r}.")
    at = len(_MAGIC)
    heads, parts, accesses = [], [], []
    while True:
        head = _one(content, at, _HEAD, path)
        at += _HEAD.itemsize
        if head["instructions"] == 0:
            break
        rows, sampled = int(head["rows"]), int(head["sampled"])
        if at + rows * _ROW.itemsize + sampled * ACCESS.itemsize > len(content):
            raise _cut(path)
        heads.append(head)
        parts.append(np.frombuffer(content, _ROW, rows, at))
        at += rows * _ROW.itemsize
        accesses.append(np.frombuffer(content, ACCESS, sampled, at))
        at += sampled * ACCESS.itemsize
    heap = _one(content, at, _HEAP, path)
    at += _HEAP.itemsize
    size = int.from_bytes(content[at : at + 8], "little")
    if not heads:
        return None
    table = np.concatenate(parts)
    mappings = _mappings(content[at + 8 : at + 8 + size].decode(errors="replace"))
    return Raw(
        instructions=np.array([head["instructions"] for head in heads], np.int64),
        syscalls=np.array([head["syscalls"] for head in heads], np.int64),
        interval=np.repeat(np.arange(len(heads)), [len(part) for part in parts]),
        line=table["line"],
        count=table["count"].astype(np.int64),
        mappings=tuple(mapping for mapping in mappings if mapping.path),
        accesses=np.concatenate(accesses),
        anonymous=tuple(mapping for mapping in mappings if not mapping.path),
        heap=(int(heap["begin"]), int(heap["end"])),
    )


def _one(content: bytes, at: int, dtype: np.dtype[Any], path: Path) -> Any:
    if at + dtype.itemsize > len(content):
        raise _cut(path)
    return np.frombuffer(content, dtype, 1, at)[0]


def _cut(path: Path) -> RecordingError:
    return RecordingError(f"{path}: ends in the middle. The emulator was killed, or the disk is full. Record again.")


def _mappings(text: str) -> tuple[Mapping, ...]:
    """Parse /proc/self/maps: mappings of files, and of nothing."""
    pattern = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ *(/.*)?$", re.MULTILINE)
    return tuple(
        Mapping(int(begin, 16), int(end, 16), int(offset, 16), path)
        for begin, end, offset, path in pattern.findall(text)
    )
