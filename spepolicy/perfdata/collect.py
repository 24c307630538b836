"""What a walk over the records of a perf.data file gathers, a table a kind, and what becomes of each record.

`spepolicy.perfdata.capture` puts it together. A record that cannot be used is noted as a problem, and the walk goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.perfdata.compressed import compressed_body, inflate
from spepolicy.perfdata.container import PerfFile, Record, parse_attr
from spepolicy.perfdata.layout import (
    ARM_SPE,
    CPU_MAGIC,
    LAYOUTS,
    TEXT_FEATURES,
    AuxtraceInfo,
    Feature,
    Misc,
    SampleId,
    TimeConv,
    Type,
    parse_body,
    text_of,
)
from spepolicy.perfdata.stream import Queue

__all__ = [
    "AUX",
    "COMM",
    "ERROR",
    "LOST",
    "MAP",
    "SWITCH",
    "Collected",
    "auxtrace_info",
    "collect",
    "machine_of",
    "processors",
]

_WHO = [("time_ns", "i8"), ("cpu", "i4"), ("pid", "i4"), ("tid", "i4")]  # from trailers; -1: not told
AUX = np.dtype([("offset", "u8"), ("size", "u8"), ("flags", "u8"), *_WHO])
"""PERF_RECORD_AUX: what was added to the AUX area, `AuxFlag`s."""
LOST = np.dtype([("count", "u8"), ("samples", "u1"), *_WHO])
"""PERF_RECORD_LOST (records of any kind) and, with `samples`, PERF_RECORD_LOST_SAMPLES."""
ERROR = np.dtype([("code", "u4"), ("ip", "u8"), ("message", "i4"), *_WHO])
"""PERF_RECORD_AUXTRACE_ERROR; `message` indexes `Capture.names`."""
MAP = np.dtype([("start", "u8"), ("end", "u8"), ("page_offset", "u8"), ("name", "i4"), ("build_id", "i4"), *_WHO])
"""MMAP and MMAP2. `name` and `build_id` index `Capture.names`; a build id is hexadecimal text, -1 if not told."""
COMM = np.dtype([("name", "i4"), *_WHO])
SWITCH = np.dtype([("out", "u1"), ("other", "i4"), *_WHO])
"""SWITCH and SWITCH_CPU_WIDE: `other` is the tid that comes next (`out`) or that was before."""

_TABLES = {"aux": AUX, "lost": LOST, "errors": ERROR, "maps": MAP, "comms": COMM, "switches": SWITCH}


class _Rows:
    """Rows of a dtype, collected without a Python object each."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.raw = dtype, bytearray()
        self.form = struct.Struct("<" + "".join(_CODES[dtype[name].str[1:]] for name in dtype.names or ()))

    def add(self, *values: int) -> None:
        self.raw += self.form.pack(*values)

    def array(self) -> NDArray[Any]:
        return np.frombuffer(bytes(self.raw), self.dtype)


_CODES = {"u8": "Q", "i8": "q", "u4": "I", "i4": "i", "u1": "B"}


@dataclass
class Collected:
    """What a walk over the stream gathers."""

    file: PerfFile
    rows: dict[str, _Rows] = field(default_factory=lambda: {name: _Rows(dtype) for name, dtype in _TABLES.items()})
    names: dict[str, int] = field(default_factory=dict)
    queues: dict[int, Queue] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    clock: TimeConv | None = None
    info: AuxtraceInfo | None = None
    compressed: list[memoryview] = field(default_factory=list)
    compressed_at: int = -1  # byte in the file of the first

    def tables(self) -> dict[str, NDArray[Any]]:
        """Return the tables by the names that `spepolicy.perfdata.capture.Capture` has them under."""
        return {name: rows.array() for name, rows in self.rows.items()}

    def name(self, text: str) -> int:
        return self.names.setdefault(text, len(self.names))

    def take(self, record: Record) -> None:
        """Use one record, or note why it cannot be used."""
        self.counts[record.kind] = self.counts.get(record.kind, 0) + 1
        use = _USES.get(record.kind)
        if use is None:
            return
        try:
            use(self, record)
        except (ValueError, struct.error) as error:
            self.file.problems.add(record.offset, f"{Type(record.kind).name} is not used: {error}")

    def body(self, record: Record) -> tuple[Any, tuple[int, int, int, int]]:
        """Return the body of a record of the kernel's, and time, cpu, pid and tid of its trailer."""
        kind = Type(record.kind)
        who: SampleId = self.file.sample_id(record)
        body = parse_body(kind, self.file.without_trailer(record)) if kind in LAYOUTS else None
        return body, (_clip(who.time), who.cpu, who.pid, who.tid)


def collect(file: PerfFile) -> Collected:
    """Walk the records of *file*."""
    got = Collected(file)
    for record in file.records():
        got.take(record)
    if got.compressed:
        for record in inflate(got.compressed, got.compressed_at, len(file.data), file.problems):
            got.take(record)
    return got


# ---- what becomes of each type of record -----------------------------------------------------------------------------


def _aux(got: Collected, record: Record) -> None:
    body, who = got.body(record)
    got.rows["aux"].add(body.offset, body.size, body.flags, *who)


def _lost(got: Collected, record: Record) -> None:
    body, who = got.body(record)
    got.rows["lost"].add(body.lost, int(record.kind == Type.LOST_SAMPLES), *who)


def _map(got: Collected, record: Record) -> None:
    body, (time, cpu, _, _) = got.body(record)
    build_id = -1
    if record.kind == Type.MMAP2 and record.misc & Misc.MMAP_BUILD_ID:
        build_id = got.name(body.identity[4 : 4 + min(body.identity[0], 20)].hex())
    end = min(body.start + body.length, (1 << 64) - 1)
    got.rows["maps"].add(
        body.start, end, body.page_offset, got.name(body.name), build_id, time, cpu, body.pid, body.tid
    )


def _comm(got: Collected, record: Record) -> None:
    body, (time, cpu, _, _) = got.body(record)
    got.rows["comms"].add(got.name(body.name), time, cpu, body.pid, body.tid)


def _switch(got: Collected, record: Record) -> None:
    body, who = got.body(record)
    got.rows["switches"].add(int(bool(record.misc & Misc.SWITCH_OUT)), -1 if body is None else body.tid, *who)


def _error(got: Collected, record: Record) -> None:
    body = parse_body(Type.AUXTRACE_ERROR, record.body)
    time = _clip(body.time) if body.version else -1
    got.rows["errors"].add(body.code, body.ip, got.name(body.message), time, body.cpu, body.pid, body.tid)


def _time_conv(got: Collected, record: Record) -> None:
    got.clock = parse_body(Type.TIME_CONV, record.body)


def _auxtrace_info(got: Collected, record: Record) -> None:
    info = parse_body(Type.AUXTRACE_INFO, record.body)
    if info.kind != ARM_SPE:
        raise ValueError(f"it describes AUX data of type {info.kind}; Arm SPE is {ARM_SPE}")
    got.info = info


def _auxtrace(got: Collected, record: Record) -> None:
    piece = parse_body(Type.AUXTRACE, record.body)
    got.queues.setdefault(piece.queue, Queue()).add(record, piece)


def _header_attr(got: Collected, record: Record) -> None:
    """An event, in a file that came through a pipe."""
    size = int.from_bytes(record.body[4:8], "little")
    if not 64 <= size <= len(record.body):
        raise ValueError(f"it claims a perf_event_attr of {size} bytes and has {len(record.body)}")
    if len(got.file.events) >= 1 << 12:
        raise ValueError("there are 4096 events already")
    event = parse_attr(record.body[:size])
    ids = record.body[size:]
    event.ids = struct.unpack_from(f"<{len(ids) // 8}Q", ids)
    got.file.events.append(event)


def _header_feature(got: Collected, record: Record) -> None:
    if len(record.body) < 8:
        raise ValueError("it has no number")
    got.file.features[int.from_bytes(record.body[:8], "little")] = record.body[8:]


def _compressed(got: Collected, record: Record) -> None:
    got.compressed.append(compressed_body(record))
    if got.compressed_at < 0:
        got.compressed_at = record.offset


_USES: dict[int, Callable[[Collected, Record], None]] = {
    Type.AUX: _aux,
    Type.LOST: _lost,
    Type.LOST_SAMPLES: _lost,
    Type.MMAP: _map,
    Type.MMAP2: _map,
    Type.COMM: _comm,
    Type.SWITCH: _switch,
    Type.SWITCH_CPU_WIDE: _switch,
    Type.AUXTRACE_ERROR: _error,
    Type.TIME_CONV: _time_conv,
    Type.AUXTRACE_INFO: _auxtrace_info,
    Type.AUXTRACE: _auxtrace,
    Type.HEADER_ATTR: _header_attr,
    Type.HEADER_FEATURE: _header_feature,
    Type.COMPRESSED: _compressed,
    Type.COMPRESSED2: _compressed,
}


# ---- what the file says of the machine -------------------------------------------------------------------------------


def processors(got: Collected, midr: dict[int, int]) -> dict[int, int]:
    """Return MIDR_EL1 by CPU as AUXTRACE_INFO gives it, else under -1 what the CPUID feature says of all CPUs."""
    cpuid = text_of(got.file.features.get(Feature.CPUID, memoryview(b""))[4:])
    return midr or ({-1: int(cpuid, 16)} if _hexadecimal(cpuid) else {})


def auxtrace_info(got: Collected) -> tuple[int, set[int], dict[int, int]]:
    """Return the version of AUXTRACE_INFO, the PMU types that it names, and MIDR_EL1 by CPU.

    Two words are version 1: PMU type and a flag. Version 2 begins 2, words of its header, PMU type, CPUs; then, for
    each CPU, a magic number, its number, the words that follow, and of these MIDR_EL1 and the PMU type first.
    """
    if got.info is None or len(got.info.words) < 2:
        return 0, set(), {}
    words = got.info.words
    if len(words) == 2:
        return 1, {words[0]}, {}
    if words[0] != 2 or len(words) < 4:
        got.file.problems.add(
            -1, f"AUXTRACE_INFO has version {words[0]}, which is not known here; its CPUs are not read"
        )
        return int(words[0]), set(), {}
    kinds, midr = {words[2]}, {}
    at = words[1]
    while at + 5 <= len(words) and words[at] == CPU_MAGIC:
        cpu, size = words[at + 1], words[at + 2]
        if size < 2:
            break
        midr[_int32(cpu)] = words[at + 3]
        kinds.add(words[at + 4])
        at += 3 + size
    if len(midr) != words[3]:
        got.file.problems.add(-1, f"AUXTRACE_INFO announces {words[3]} CPUs and describes {len(midr)}")
    return 2, {kind for kind in kinds if kind != (1 << 64) - 1}, midr


def machine_of(file: PerfFile) -> dict[str, str]:
    """Return the header features that are text; a command line's words are joined by spaces."""
    found = {}
    for feature in TEXT_FEATURES:
        if feature in file.features:
            found[feature.name.lower()] = text_of(file.features[feature][4:])
    raw = file.features.get(Feature.CMDLINE)
    if raw is not None and len(raw) >= 4:
        words, at = [], 4
        for _ in range(min(int.from_bytes(raw[:4], "little"), len(raw) // 4)):
            size = int.from_bytes(raw[at : at + 4], "little")
            words.append(text_of(raw[at + 4 : at + 4 + size]))
            at += 4 + size
            if at + 4 > len(raw):
                break
        found["cmdline"] = " ".join(words)
    return found


def _hexadecimal(text: str) -> bool:
    """Whether *text* is a MIDR_EL1, as arm64 writes it into the CPUID feature."""
    if not text.startswith("0x"):
        return False
    try:
        int(text, 16)
    except ValueError:
        return False
    return True


def _clip(time: int) -> int:
    return min(time, (1 << 63) - 1)


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
