"""The container: header, events, features and the stream of records of a perf.data file, however damaged.

`PerfFile` holds what the header says; `PerfFile.records` walks the stream. Both note what is wrong as `Problem`s,
with its place in the file, and go on with what can be told for certain:

* A recorder that was killed leaves a header whose data size is 0: the stream then ends where the file ends.
* A file that was cut: the last record, or the AUX bytes behind it, are short. They are used as far as they go.
* A record that cannot be one (a size below 8 or beyond the end, an unknown type): the stream is taken up again at the
  next multiple of 8 from which `_CHAIN` records follow each other; what lies between is reported as skipped.

Memory is the file itself plus one record at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from spepolicy.errors import CaptureError
from spepolicy.perfdata.layout import (
    FILE_HEADER_BYTES,
    FIRST_USER_TYPE,
    HEADER,
    MAGIC,
    MAGIC_BIG_ENDIAN,
    PIPE_HEADER_BYTES,
    SECTION,
    AttrFlag,
    Feature,
    SampleId,
    Type,
    parse_sample_id,
    sample_id_bytes,
)

__all__ = ["Event", "PerfFile", "Problem", "Problems", "Record", "known_type", "open_container", "parse_attr"]

MAX_PROBLEMS = 1000  # reported one by one; of the rest only the number
_CHAIN = 3
_ATTR_FIXED = struct.Struct("<IIQQQQQIIQ")  # type, size, config, period, sample_type, read_format, flags, .., config1
_KNOWN = np.zeros(1 << 16, dtype=bool)
_KNOWN[[int(kind) for kind in Type]] = True
_RESYNC_BLOCK = 1 << 20


class Problem(NamedTuple):
    """Something that is wrong with the file."""

    offset: int  # byte in the file, -1 if it has no place
    text: str

    def __str__(self) -> str:
        return self.text if self.offset < 0 else f"byte {self.offset:#x}: {self.text}"


@dataclass
class Problems:
    """The problems of a file, in the order found; beyond `MAX_PROBLEMS` they are only counted."""

    first: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, offset: int, text: str) -> None:
        """Note that *text* holds at byte *offset*."""
        self.count += 1
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(Problem(offset, text))


@dataclass
class Event:
    """One `perf_event_attr` with the identifiers that its trailers carry and the name from the event description."""

    kind: int  # attr.type: the PMU
    config: int
    period: int
    sample_type: int
    flags: int
    event_filter: int = 0  # attr.config1: PMSEVFR_EL1
    min_latency: int = 0  # attr.config2: PMSLATFR_EL1
    inverted_filter: int = 0  # attr.config3: PMSNEVFR_EL1
    ids: tuple[int, ...] = ()
    name: str = ""


class Record(NamedTuple):
    """One record of the stream. `body` begins behind the 8 bytes of the header; `payload` follows an AUXTRACE."""

    offset: int
    kind: int
    misc: int
    body: memoryview
    payload: memoryview


@dataclass
class PerfFile:
    """A perf.data file in memory."""

    data: memoryview
    pipe: bool
    stream: tuple[int, int]  # where the records begin and end
    events: list[Event]
    features: dict[int, memoryview]
    problems: Problems
    skipped_bytes: int = 0

    def records(self) -> Iterator[Record]:
        """Walk the stream; see the module for what happens at damage."""
        at, end = self.stream
        while at < end:
            step = _record_at(self.data, at, end)
            if isinstance(step, str):
                self.problems.add(at, step)
                found = _resync(self.data, at + 8, end)
                self.skipped_bytes += found - at
                if found < end:
                    self.problems.add(found, f"records follow each other again; {found - at} bytes were skipped")
                at = found
                continue
            record, following, short = step
            if short:
                self.problems.add(at, f"the file ends {short} bytes before the AUX data of this record does")
            yield record
            at = following

    def sample_id(self, record: Record) -> SampleId:
        """Return the trailer of a record of the kernel's; all -1 if the file's events have none."""
        form = self.trailer_type
        if record.kind >= FIRST_USER_TYPE or form is None:
            return SampleId()
        return parse_sample_id(form, record.body)

    def without_trailer(self, record: Record) -> memoryview:
        """Return the body of a record of the kernel's without its trailer."""
        form = self.trailer_type
        size = 0 if form is None else sample_id_bytes(form)
        if record.kind >= FIRST_USER_TYPE or size == 0 or size > len(record.body):
            return record.body
        return record.body[:-size]

    @property
    def trailer_type(self) -> int | None:
        """The sample_type that lays out trailers. perf asks that all events agree on it (sample_id_all)."""
        for event in self.events:
            if event.flags & AttrFlag.SAMPLE_ID_ALL:
                return event.sample_type
        return None


def _record_at(data: memoryview, at: int, end: int) -> tuple[Record, int, int] | str:
    """Return the record at *at*, where the next begins, and how many payload bytes the file lacks; or what is wrong."""
    if at + 8 > end:
        return f"{end - at} bytes are left, too few for a record"
    kind, misc, size = HEADER.unpack_from(data, at)
    if not known_type(kind):
        return f"no record has type {kind}"
    if size < 8:
        return f"a record of type {Type(kind).name} cannot have {size} bytes"
    if at + size > end:
        return f"{Type(kind).name} of {size} bytes is cut after {end - at}"
    body = data[at + 8 : at + size]
    payload, following, short = body[:0], at + size, 0
    if kind in (Type.AUXTRACE, Type.HEADER_TRACING_DATA):
        length = _payload_bytes(kind, body)
        if length is None:
            return f"{Type(kind).name} has {size} bytes, too few to say how much data follows"
        short = max(0, following + length - end)
        payload = data[following : following + length - short]
        following += length - short
    return Record(at, kind, misc, body, payload), following, short


def _payload_bytes(kind: int, body: memoryview) -> int | None:
    if kind == Type.AUXTRACE:
        return int.from_bytes(body[:8], "little") if len(body) >= 40 else None
    return int.from_bytes(body[:4], "little") if len(body) >= 4 else None


def known_type(kind: int) -> bool:
    """Whether there are records of type *kind*."""
    return kind < 1 << 16 and bool(_KNOWN[kind])


def _resync(data: memoryview, start: int, end: int) -> int:
    """Return the first multiple of 8 from *start* at which records follow each other again, or *end*."""
    at = start + -start % 8
    while at + 8 <= end:
        stop = min(at + _RESYNC_BLOCK, end - (end - at) % 8)
        words = np.frombuffer(data[at:stop], np.uint64)
        kind, size = words & np.uint64(0xFFFFFFFF), words >> np.uint64(48)
        likely = (kind < np.uint64(1 << 16)) & (size >= np.uint64(8)) & (size % np.uint64(8) == 0)
        for n in np.flatnonzero(likely & _KNOWN[(kind & np.uint64(0xFFFF)).astype(np.int64)]).tolist():
            if _follow(data, at + 8 * n, end):
                return at + 8 * n
        at = stop
    return end


def _follow(data: memoryview, at: int, end: int) -> bool:
    """Whether `_CHAIN` whole records, or as many as reach exactly to the end, begin at *at*."""
    for _ in range(_CHAIN):
        step = _record_at(data, at, end)
        if isinstance(step, str) or step[2]:
            return False
        at = step[1]
        if at == end:
            return True
    return True


# ---- header ----------------------------------------------------------------------------------------------------------


def open_container(data: memoryview, name: str) -> PerfFile:
    """Return the container in *data*. Raises `CaptureError` if it is no perf.data that can be read at all."""
    if data[:8] == MAGIC_BIG_ENDIAN:
        raise CaptureError(
            f"'{name}' was recorded on a big-endian machine. Only little-endian perf.data can be read here; convert it "
            "with 'perf inject' on a little-endian machine."
        )
    if data[:8] != MAGIC or len(data) < PIPE_HEADER_BYTES:
        raise CaptureError(
            f"'{name}' is not a perf.data file: it must begin with the 8 bytes PERFILE2 and a header. Give a file that "
            "'perf record -e arm_spe_0//' has written."
        )
    (header_bytes,) = struct.unpack_from("<Q", data, 8)
    problems = Problems()
    if header_bytes == PIPE_HEADER_BYTES:
        return PerfFile(data, True, (PIPE_HEADER_BYTES, len(data)), [], {}, problems)
    if header_bytes not in FILE_HEADER_BYTES or len(data) < header_bytes:
        raise CaptureError(
            f"'{name}': its perf.data header claims {header_bytes} bytes and the file has {len(data)}. It must be 16 "
            "(written to a pipe), 72 or 104 bytes. The file is damaged at its very beginning or is not perf.data."
        )
    attr_bytes, attrs_at, attrs_size, data_at, data_size = struct.unpack_from("<QQQQQ", data, 16)
    stream = _stream(data, data_at, data_size, int(header_bytes), problems)
    events = _events(data, attr_bytes, attrs_at, attrs_size, problems)
    features = {} if header_bytes < 104 else _features(data, data_at, data_size, problems)
    return PerfFile(data, False, stream, events, features, problems)


def _stream(data: memoryview, at: int, size: int, header_bytes: int, problems: Problems) -> tuple[int, int]:
    if at < header_bytes or at > len(data):
        problems.add(0x28, f"the header puts the records at byte {at:#x}, outside the file: there is nothing to read")
        return len(data), len(data)
    if size == 0 and len(data) > at:
        problems.add(
            0x30, "the header gives the records no size: the recorder was killed. Reading to the end of the file"
        )
        return at, len(data)
    if at + size > len(data):
        problems.add(0x30, f"the file is cut: {at + size - len(data)} bytes that the header counts are missing")
        return at, len(data)
    return at, at + size


def _events(data: memoryview, attr_bytes: int, at: int, size: int, problems: Problems) -> list[Event]:
    """Return the events of the header's section; each is a perf_event_attr and the section of its ids."""
    events: list[Event] = []
    if not 64 + SECTION.size <= attr_bytes <= 4096 or at + size > len(data):
        problems.add(0x10, f"no events: the header claims {size} bytes of {attr_bytes} bytes each at {at:#x}")
        return events
    for start in range(at, at + size - attr_bytes + 1, attr_bytes):
        event = parse_attr(data[start : start + attr_bytes - SECTION.size])
        ids_at, ids_size = SECTION.unpack_from(data, start + attr_bytes - SECTION.size)
        if ids_at + ids_size > len(data) or ids_size % 8:
            problems.add(start, f"event {len(events)}: its {ids_size} bytes of ids at {ids_at:#x} are not in the file")
        elif ids_size <= 8 * (1 << 16):  # more ids than any machine has CPUs
            event.ids = struct.unpack_from(f"<{ids_size // 8}Q", data, ids_at)
        else:
            problems.add(start, f"event {len(events)}: {ids_size // 8} ids are too many to be true")
        events.append(event)
        if len(events) >= 1 << 12:
            problems.add(start, "more than 4096 events: the rest is not read")
            break
    return events


def parse_attr(raw: memoryview) -> Event:
    """Return the event of a perf_event_attr of any version; fields that it is too short for are 0."""
    padded = bytes(raw[:136]) + bytes(max(0, 136 - len(raw)))
    kind, _, config, period, sample_type, _, flags, _, _, config1 = _ATTR_FIXED.unpack_from(padded)
    (config2,) = struct.unpack_from("<Q", padded, 64)
    (config3,) = struct.unpack_from("<Q", padded, 128)
    return Event(kind, config, period, sample_type, flags, config1, config2, config3)


def _features(data: memoryview, data_at: int, data_size: int, problems: Problems) -> dict[int, memoryview]:
    """Return the feature sections, whose table follows the records, by bit."""
    bits = [
        64 * n + b for n, word in enumerate(struct.unpack_from("<4Q", data, 72)) for b in range(64) if word >> b & 1
    ]
    table = data_at + data_size
    if not bits:
        return {}
    if data_size == 0 or table + SECTION.size * len(bits) > len(data):
        problems.add(72, f"{len(bits)} features are announced, but their table is not in the file")
        return {}
    features = {}
    for n, bit in enumerate(bits):
        at, size = SECTION.unpack_from(data, table + SECTION.size * n)
        if at + size > len(data):
            name = Feature(bit).name if bit in set(Feature) else str(bit)
            problems.add(table + SECTION.size * n, f"feature {name}: {size} bytes at {at:#x} are not in the file")
            continue
        features[bit] = data[at : at + size]
    return features
