"""Write perf.data files that stock perf decodes.

The order of records and what may not be missing are those of perfdata.md sections 2 and 3, where each omission was
tried on perf 6.1: identifiers and sample_id_all on every event, TIME_CONV before AUXTRACE_INFO before any
AUXTRACE, a queue a CPU. AUXTRACE_INFO is written as version 1, which every perf reads; perf 6.1 takes version 2 for a
PMU type of 2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spepolicy.perfdata.clock import conversion
from spepolicy.perfdata.container import Event
from spepolicy.perfdata.layout import (
    ARM_SPE,
    FIRST_USER_TYPE,
    HEADER,
    MAGIC,
    SECTION,
    TEXT_FEATURES,
    AttrFlag,
    Auxtrace,
    AuxtraceInfo,
    Feature,
    SampleId,
    SampleType,
    SpeConfig,
    TimeConv,
    Type,
    pack_body,
    pack_sample_id,
)

__all__ = ["Writer", "dummy_event", "spe_event"]

_ATTR_BYTES = 128  # PERF_ATTR_SIZE_VER7, the largest that perf 6.1 takes
_HEADER_BYTES = 104
_TRAILER = SampleType.TID | SampleType.TIME | SampleType.CPU | SampleType.IDENTIFIER
# What `perf script -F addr,phys_addr,data_src,weight` prints must be in the event's sample_type (perfdata.md 3).
_SAMPLES = _TRAILER | SampleType.IP | SampleType.ADDR | SampleType.PHYS_ADDR | SampleType.DATA_SRC | SampleType.WEIGHT
_AUXTRACE_BYTES = 48
_PMU_TYPE = 8  # any number that no static PMU has; real machines show 7 to 12
_RECORD_LIMIT = 0xFFF8


def spe_event(
    period: int, config: SpeConfig, ids: Sequence[int], *, event_filter: int = 0, min_latency: int = 0, flags: int = 0
) -> Event:
    """Return the event of `perf record -e arm_spe_0/.../`. *flags*: further `AttrFlag`s, such as EXCLUDE_KERNEL."""
    both = AttrFlag.SAMPLE_ID_ALL | AttrFlag.INHERIT | AttrFlag.EXCLUDE_GUEST | flags
    return Event(
        _PMU_TYPE,
        int(config),
        period,
        int(_SAMPLES),
        int(both),
        event_filter,
        min_latency,
        0,
        tuple(ids),
        "arm_spe_0//",
    )


def dummy_event(ids: Sequence[int]) -> Event:
    """Return the event that perf opens beside SPE's to learn of tasks and mappings (PERF_COUNT_SW_DUMMY)."""
    flags = AttrFlag.SAMPLE_ID_ALL | AttrFlag.INHERIT | AttrFlag.EXCLUDE_KERNEL | AttrFlag.MMAP | AttrFlag.MMAP2
    flags |= AttrFlag.COMM | AttrFlag.COMM_EXEC | AttrFlag.TASK
    return Event(1, 9, 1, int(_TRAILER), int(flags), ids=tuple(ids), name="dummy:u")


@dataclass
class Writer:
    """Collects records in the order of their calls; `content` returns the file."""

    events: Sequence[Event]
    features: Mapping[Feature, str | Sequence[str]] = field(default_factory=dict)
    cpus: int = 1
    memory_kib: int = 1 << 20
    _stream: bytearray = field(default_factory=bytearray)
    _index: list[int] = field(default_factory=list)

    def open(self, clock: TimeConv | None = None) -> None:
        """Write what must come first: TIME_CONV and AUXTRACE_INFO. Without *clock* ticks are ns."""
        self.add(Type.TIME_CONV, clock or conversion(1_000_000_000))
        self.add(Type.AUXTRACE_INFO, AuxtraceInfo(ARM_SPE, 0, (self.events[0].kind, 1)))

    def add(self, kind: Type, body: Any = b"", who: SampleId | None = None, misc: int = 0) -> None:
        """Write one record; *body* is bytes or a tuple of `spepolicy.perfdata.layout`, *who* the trailer."""
        raw = body if isinstance(body, bytes) else pack_body(kind, body)
        if kind < FIRST_USER_TYPE:
            raw += pack_sample_id(self.events[0].sample_type, who or SampleId(0, 0, 0, 0, self.events[0].ids[0]))
        size = HEADER.size + len(raw)
        if size > _RECORD_LIMIT:
            raise ValueError(f"a {kind.name} record of {size} bytes: its header can count {_RECORD_LIMIT}")
        self._stream += HEADER.pack(kind, misc, size) + raw

    def add_aux_data(self, payload: bytes, *, offset: int, cpu: int, tid: int = -1, queue: int | None = None) -> None:
        """Write an AUXTRACE record and its data, padded to 8 bytes as perf does it. *offset*: in its ring's stream."""
        padded = payload + bytes(-len(payload) % 8)
        body = Auxtrace(len(padded), offset, len(self._index) + 1, cpu if queue is None else queue, tid, cpu, 0)
        self._index.append(len(self._stream))
        self.add(Type.AUXTRACE, body)
        self._stream += padded

    def finish_round(self) -> None:
        """Write FINISHED_ROUND: what came before is older than what comes after the next one."""
        self.add(Type.FINISHED_ROUND)

    def content(self) -> bytes:
        """Return the file."""
        entry = _ATTR_BYTES + SECTION.size
        ids = [struct.pack(f"<{len(event.ids)}Q", *event.ids) for event in self.events]
        attrs_at = _HEADER_BYTES + sum(map(len, ids))
        data_at = attrs_at + entry * len(self.events)
        attrs, at = b"", _HEADER_BYTES
        for event, raw in zip(self.events, ids, strict=True):
            attrs += pack_attr(event) + SECTION.pack(at, len(raw))
            at += len(raw)
        sections = self._sections(data_at)
        bits = [0, 0, 0, 0]
        for feature in sections:
            bits[feature // 64] |= 1 << feature % 64
        header = MAGIC + struct.pack("<QQQQQQQQ", _HEADER_BYTES, entry, attrs_at, entry * len(self.events),
                                     data_at, len(self._stream), 0, 0) + struct.pack("<4Q", *bits)  # fmt: skip
        table_at = data_at + len(self._stream)
        at = table_at + SECTION.size * len(sections)
        table, bodies = b"", b""
        for raw in sections.values():
            table += SECTION.pack(at + len(bodies), len(raw))
            bodies += raw
        return b"".join([header, *ids, attrs, self._stream, table, bodies])

    def _sections(self, data_at: int) -> dict[int, bytes]:
        """Return the feature sections by bit, ascending."""
        found: dict[int, bytes] = {}
        for feature, value in self.features.items():
            if feature in TEXT_FEATURES:
                found[feature] = _text(str(value))
            elif feature == Feature.CMDLINE:
                found[feature] = struct.pack("<I", len(value)) + b"".join(_text(word) for word in value)
        found[Feature.NRCPUS] = struct.pack("<II", self.cpus, self.cpus)
        found[Feature.TOTAL_MEM] = struct.pack("<Q", self.memory_kib)
        found[Feature.EVENT_DESC] = self._descriptions()
        found[Feature.PMU_MAPPINGS] = _mappings((event.kind, event.name) for event in self.events)
        entries = b"".join(struct.pack("<QQ", data_at + at, _AUXTRACE_BYTES) for at in self._index)
        found[Feature.AUXTRACE] = struct.pack("<Q", len(self._index)) + entries
        return dict(sorted(found.items()))

    def _descriptions(self) -> bytes:
        raw = struct.pack("<II", len(self.events), _ATTR_BYTES)
        for event in self.events:
            raw += pack_attr(event) + struct.pack("<I", len(event.ids)) + _text(event.name)
            raw += struct.pack(f"<{len(event.ids)}Q", *event.ids)
        return raw


def pack_attr(event: Event) -> bytes:
    """Return the perf_event_attr of *event* (PERF_ATTR_SIZE_VER7)."""
    raw = struct.pack("<IIQQQQQIIQQ", event.kind, _ATTR_BYTES, event.config, event.period, event.sample_type,
                      4, event.flags, 0, 0, event.event_filter, event.min_latency)  # fmt: skip
    return raw + bytes(_ATTR_BYTES - len(raw))


def _text(text: str) -> bytes:
    """Return a string of a feature section: its length, then itself, NUL-padded to 64 bytes (NAME_ALIGN)."""
    raw = text.encode() + b"\0"
    raw += bytes(-len(raw) % 64)
    return struct.pack("<I", len(raw)) + raw


def _mappings(events: Iterable[tuple[int, str]]) -> bytes:
    found = [(kind, name.partition("/")[0]) for kind, name in events if "/" in name]
    return struct.pack("<I", len(found)) + b"".join(struct.pack("<I", kind) + _text(name) for kind, name in found)
