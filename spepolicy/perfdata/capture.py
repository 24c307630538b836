"""What a perf.data file with SPE in it holds: records, when and by whom, what was lost, what ran, what is damaged.

`read` takes any file that `perf record -e arm_spe_0//` wrote, with AUXTRACE_INFO of version 1 (Linux before 6.15) or 2,
from a file or a pipe, whole or damaged. Nothing is invented: a record is one that its packets spell out, and a field
that the file does not tell is -1 or empty. Two things are done more carefully than perf does them:

* perf joins all AUX data of a queue to one stream, so a record that a buffer management event cut (PMBSR_EL1.DL) merges
  with the next one: fields of the one under the address of the other (spe.md 4.7). Here the stream ends where an AUX
  record with PERF_AUX_FLAG_PARTIAL says that the driver closed its handle, and where AUX data is missing.
* After a byte that is no packet perf goes on with the next byte, and each yields a record. Here
  `spepolicy.spe.packets` finds the next record, and reports what it left out.

Not read: samples of other events, data that perf compressed (`perf record -z`; reported), directories
(`perf record --threads`), tracepoints' formats.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import CaptureError
from spepolicy.perfdata.clock import ticks_to_ns
from spepolicy.perfdata.container import Event, PerfFile, Problem, Record, open_container, parse_attr
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
from spepolicy.perfdata.stream import NOTHING, Cuts, Decoded, Queue, decode_queue, joined
from spepolicy.spe.records import Present

__all__ = ["AUX", "COMM", "ERROR", "LOST", "MAP", "SWITCH", "WHERE", "Capture", "read"]

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
WHERE = np.dtype([("time_ns", "i8"), ("queue", "u4"), ("cpu", "i4"), ("tid", "i4")])
"""Beside each record: perf's time, and the queue, CPU and thread; -1: not told."""


@dataclass(frozen=True)
class Capture:
    """A perf.data file with SPE in it. Arrays have one row per record of their kind, in the order of the file."""

    source: str
    records: NDArray[Any]  # spepolicy.spe.records.RECORD[n], queue by queue; `offset` counts bytes of the AUX area
    extra: NDArray[Any]  # spepolicy.spe.records.EXTRA: packets without a field of their own
    where: NDArray[Any]  # WHERE[n]
    aux: NDArray[Any]  # AUX
    lost: NDArray[Any]  # LOST
    errors: NDArray[Any]  # ERROR
    maps: NDArray[Any]  # MAP
    comms: NDArray[Any]  # COMM
    switches: NDArray[Any]  # SWITCH
    names: tuple[str, ...]
    events: tuple[Event, ...]  # the SPE events
    clock: TimeConv | None
    info_version: int  # of AUXTRACE_INFO: 1 or 2
    midr: dict[int, int]  # MIDR_EL1 by CPU (version 2), or under -1 of all CPUs (header feature CPUID)
    machine: dict[str, str]  # hostname, osrelease, version, arch, cpudesc, cpuid, cmdline
    aux_bytes: int  # SPE bytes in the file
    record_counts: dict[str, int]  # records of the container by type
    problems: tuple[Problem, ...]
    problem_count: int  # more than len(problems) if there were very many
    skipped_bytes: int  # of the container and of the SPE streams, that are no part of any record

    @property
    def complete(self) -> bool:
        """Whether nothing was wrong with the file. Of samples that were never recorded `aux` and `lost` tell."""
        return self.problem_count == 0

    def in_time_order(self) -> NDArray[np.int64]:
        """Return the indices of `records` in order of time; what has no time keeps its place before all others."""
        order: NDArray[np.int64] = np.argsort(self.where["time_ns"], kind="stable")
        return order

    def report(self) -> str:
        """Return what was read, lost and wrong, for a terminal."""
        from spepolicy.perfdata.report import report

        return report(self)


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
class _Collected:
    """What a walk over the stream gathers."""

    file: PerfFile
    rows: dict[str, _Rows] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    queues: dict[int, Queue] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    clock: TimeConv | None = None
    info: AuxtraceInfo | None = None
    compressed_bytes: int = 0

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


def read(path: str | Path) -> Capture:
    """Return what the perf.data file *path* holds.

    Memory: the file and a copy of the AUX data, and for each record 104 bytes (`RECORD`) and 20 (`WHERE`), twice where
    there is more than one queue. That is 5 times the file for records of 64 bytes; the shortest have 3.

    Raises `CaptureError` if the file cannot be opened, is not perf.data, or holds no SPE data at all. Anything less is
    in `Capture.problems`.
    """
    return parse(_load(Path(path)), str(path))


def parse(content: bytes, source: str) -> Capture:
    """Return what the perf.data in *content* holds; *source* is its name in messages. Raises `CaptureError`."""
    got = _Collected(open_container(memoryview(content), source))
    got.rows = {name: _Rows(dtype) for name, dtype in _TABLES.items()}
    for record in got.file.records():
        got.take(record)
    problems = got.file.problems
    if got.info is None and not got.queues:
        why = f" {problems.count} problems were found, the first: {problems.first[0]}." if problems.first else ""
        raise CaptureError(
            f"'{source}' holds no SPE data: it has no AUXTRACE record of Arm SPE.{why} Record with "
            "'perf record -e arm_spe_0//', and see with 'perf report -D' what a file holds."
        )
    if got.info is None:
        problems.add(-1, "there is no AUXTRACE_INFO: that the AUX data is SPE's is assumed")
    if got.compressed_bytes:
        problems.add(
            -1,
            f"{got.compressed_bytes} bytes of records are compressed (perf record -z) and not read: names, losses and "
            "times of the kernel's records are missing. AUX data is never compressed, so the SPE records are all here",
        )
    tables = {name: rows.array() for name, rows in got.rows.items()}
    return _decoded(got, tables, source)


_TABLES = {"aux": AUX, "lost": LOST, "errors": ERROR, "maps": MAP, "comms": COMM, "switches": SWITCH}


def _decoded(got: _Collected, tables: dict[str, NDArray[Any]], source: str) -> Capture:
    """Decode the queues and put everything together."""
    cuts, problems = Cuts(tables["aux"]), got.file.problems
    parts, numbers, count = [NOTHING], [np.zeros(0, np.uint32)], 0
    for number, queue in sorted(got.queues.items()):
        if not queue.size:
            continue
        decoded = decode_queue(queue, cuts, problems)
        decoded.extra["record_index"] += np.uint32(count)
        count += len(decoded.records)
        parts.append(decoded)
        numbers.append(np.full(len(decoded.records), number, np.uint32))
    all_of_them = joined(parts)
    version, pmu_types, midr = _info(got)
    cpuid = text_of(got.file.features.get(Feature.CPUID, memoryview(b""))[4:])
    if not midr and _hexadecimal(cpuid):
        midr = {-1: int(cpuid, 16)}
    return Capture(
        source=source,
        records=all_of_them.records,
        extra=all_of_them.extra,
        where=_where(all_of_them, np.concatenate(numbers), got.clock, tables["switches"]),
        **tables,
        names=tuple(got.names),
        events=tuple(event for event in got.file.events if event.kind in pmu_types or not pmu_types),
        clock=got.clock,
        info_version=version,
        midr=midr,
        machine=_machine(got.file),
        aux_bytes=sum(queue.size for queue in got.queues.values()),
        record_counts={Type(kind).name: n for kind, n in sorted(got.counts.items())},
        problems=tuple(problems.first),
        problem_count=problems.count,
        skipped_bytes=all_of_them.skipped_bytes + got.file.skipped_bytes,
    )


def _where(
    decoded: Decoded, queues: NDArray[np.uint32], clock: TimeConv | None, switches: NDArray[Any]
) -> NDArray[Any]:
    """Return WHERE for the records."""
    records = decoded.records
    where = np.zeros(len(records), WHERE)
    where["queue"], where["cpu"], where["tid"], where["time_ns"] = queues, decoded.cpu, decoded.tid, -1
    if clock is not None and clock.multiplier:
        timed = (records["present"] & int(Present.TIMESTAMP)) != 0
        where["time_ns"][timed] = ticks_to_ns(clock, records["timestamp"][timed])
    _threads(records, where, switches)
    return where


def _threads(records: NDArray[Any], where: NDArray[Any], switches: NDArray[Any]) -> None:
    """Set the thread of each record: its context packet, else who its CPU switched to, else the queue's own."""
    known = switches[(switches["time_ns"] >= 0) & (switches["cpu"] >= 0)]
    if len(known):
        known = known[np.lexsort((known["time_ns"], known["cpu"]))]
        running = np.where(known["out"] != 0, known["other"], known["tid"])
        rows = np.flatnonzero((where["time_ns"] >= 0) & np.isin(where["cpu"], known["cpu"]))
        rows = rows[np.argsort(where["cpu"][rows], kind="stable")]  # may be none: switches of CPUs without records
        cpus, first = np.unique(where["cpu"][rows], return_index=True)
        low, high = (np.searchsorted(known["cpu"], cpus, side) for side in ("left", "right"))
        ends = [*first[1:].tolist(), len(rows)]
        for start, stop, begin, end in zip(first.tolist(), ends, low.tolist(), high.tolist(), strict=False):
            part = rows[start:stop]
            at = np.searchsorted(known["time_ns"][begin:end], where["time_ns"][part], "right") - 1
            where["tid"][part[at >= 0]] = running[begin:end][at[at >= 0]]
    for bit, name in ((Present.CONTEXT_EL2, "context_el2"), (Present.CONTEXT_EL1, "context_el1")):
        has = (records["present"] & int(bit)) != 0
        where["tid"][has] = records[name][has].astype(np.int32)


# ---- what becomes of each type of record -----------------------------------------------------------------------------


def _aux(got: _Collected, record: Record) -> None:
    body, who = got.body(record)
    got.rows["aux"].add(body.offset, body.size, body.flags, *who)


def _lost(got: _Collected, record: Record) -> None:
    body, who = got.body(record)
    got.rows["lost"].add(body.lost, int(record.kind == Type.LOST_SAMPLES), *who)


def _map(got: _Collected, record: Record) -> None:
    body, (time, cpu, _, _) = got.body(record)
    build_id = -1
    if record.kind == Type.MMAP2 and record.misc & Misc.MMAP_BUILD_ID:
        build_id = got.name(body.identity[4 : 4 + min(body.identity[0], 20)].hex())
    end = min(body.start + body.length, (1 << 64) - 1)
    got.rows["maps"].add(
        body.start, end, body.page_offset, got.name(body.name), build_id, time, cpu, body.pid, body.tid
    )


def _comm(got: _Collected, record: Record) -> None:
    body, (time, cpu, _, _) = got.body(record)
    got.rows["comms"].add(got.name(body.name), time, cpu, body.pid, body.tid)


def _switch(got: _Collected, record: Record) -> None:
    body, who = got.body(record)
    got.rows["switches"].add(int(bool(record.misc & Misc.SWITCH_OUT)), -1 if body is None else body.tid, *who)


def _error(got: _Collected, record: Record) -> None:
    body = parse_body(Type.AUXTRACE_ERROR, record.body)
    time = _clip(body.time) if body.version else -1
    got.rows["errors"].add(body.code, body.ip, got.name(body.message), time, body.cpu, body.pid, body.tid)


def _time_conv(got: _Collected, record: Record) -> None:
    got.clock = parse_body(Type.TIME_CONV, record.body)


def _auxtrace_info(got: _Collected, record: Record) -> None:
    info = parse_body(Type.AUXTRACE_INFO, record.body)
    if info.kind != ARM_SPE:
        raise ValueError(f"it describes AUX data of type {info.kind}; Arm SPE is {ARM_SPE}")
    got.info = info


def _auxtrace(got: _Collected, record: Record) -> None:
    piece = parse_body(Type.AUXTRACE, record.body)
    got.queues.setdefault(piece.queue, Queue()).add(record, piece)


def _header_attr(got: _Collected, record: Record) -> None:
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


def _header_feature(got: _Collected, record: Record) -> None:
    if len(record.body) < 8:
        raise ValueError("it has no number")
    got.file.features[int.from_bytes(record.body[:8], "little")] = record.body[8:]


def _compressed(got: _Collected, record: Record) -> None:
    got.compressed_bytes += len(record.body)


_USES: dict[int, Callable[[_Collected, Record], None]] = {
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


# ---- the rest --------------------------------------------------------------------------------------------------------


def _info(got: _Collected) -> tuple[int, set[int], dict[int, int]]:
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


def _machine(file: PerfFile) -> dict[str, str]:
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


def _load(path: Path) -> bytes:
    """Return the content of a file or pipe; a device would never end."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CaptureError(
                f"'{path}' is a directory. perf.data directories ('perf record --threads') are not read; "
                "record without --threads."
            )
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise CaptureError(f"'{path}' is neither a file nor a pipe. Give a perf.data file.")
        return path.read_bytes()
    except OSError as error:
        raise CaptureError(f"'{path}' cannot be read: {error.strerror}. Give a perf.data file.") from error


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
