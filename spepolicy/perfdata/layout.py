"""The bytes of perf.data: record types, their fields, flags and features, as tables that reader and writer share.

Sources: tools/perf/Documentation/perf.data-file-format.txt, tools/lib/perf/include/perf/event.h and
include/uapi/linux/perf_event.h of Linux 6.18; what stock perf 6.1 needs of them is in perfdata.md (sections 1 to 4 of
it were tested record by record). All integers are little-endian. A record is a header (u32 type, u16 misc, u16 size,
which counts the header), a body and, if the kernel wrote it, a trailer that says who, when and where (`SampleId`).
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

MAGIC = b"PERFILE2"
MAGIC_BIG_ENDIAN = MAGIC[::-1]
PIPE_HEADER_BYTES = 16
FILE_HEADER_BYTES = (72, 104)  # without and with the bitmap of features; perf accepts nothing else
HEADER = struct.Struct("<IHH")
SECTION = struct.Struct("<QQ")  # offset and size in the file
ARM_SPE = 4  # enum auxtrace_type: PERF_AUXTRACE_ARM_SPE
CPU_MAGIC = 0x1010101010101010  # ARM_SPE_CPU_MAGIC, of each CPU's words in AUXTRACE_INFO v2


class Type(IntEnum):
    """Record types: below 64 the kernel's, from 64 on perf's own."""

    MMAP = 1
    LOST = 2
    COMM = 3
    EXIT = 4
    THROTTLE = 5
    UNTHROTTLE = 6
    FORK = 7
    READ = 8
    SAMPLE = 9
    MMAP2 = 10
    AUX = 11
    ITRACE_START = 12
    LOST_SAMPLES = 13
    SWITCH = 14
    SWITCH_CPU_WIDE = 15
    NAMESPACES = 16
    KSYMBOL = 17
    BPF_EVENT = 18
    CGROUP = 19
    TEXT_POKE = 20
    AUX_OUTPUT_HW_ID = 21
    HEADER_ATTR = 64
    HEADER_EVENT_TYPE = 65
    HEADER_TRACING_DATA = 66
    HEADER_BUILD_ID = 67
    FINISHED_ROUND = 68
    ID_INDEX = 69
    AUXTRACE_INFO = 70
    AUXTRACE = 71
    AUXTRACE_ERROR = 72
    THREAD_MAP = 73
    CPU_MAP = 74
    STAT_CONFIG = 75
    STAT = 76
    STAT_ROUND = 77
    EVENT_UPDATE = 78
    TIME_CONV = 79
    HEADER_FEATURE = 80
    COMPRESSED = 81
    FINISHED_INIT = 82
    COMPRESSED2 = 83


FIRST_USER_TYPE = 64  # from here on records have no trailer


class Misc(IntFlag):
    """Bits of the header's `misc` that are used here."""

    KERNEL = 1
    USER = 2
    SWITCH_OUT = 1 << 13  # of SWITCH and SWITCH_CPU_WIDE
    COMM_EXEC = 1 << 13  # of COMM
    MMAP_DATA = 1 << 13  # of MMAP2: what is mapped is not executable
    MMAP_BUILD_ID = 1 << 14  # of MMAP2: a build id stands in place of device and inode


class AuxFlag(IntFlag):
    """Flags of PERF_RECORD_AUX. When the Linux driver sets which: spe.md 3.4."""

    TRUNCATED = 1
    OVERWRITE = 2
    PARTIAL = 4
    COLLISION = 8


class SampleType(IntFlag):
    """Bits of `perf_event_attr.sample_type`."""

    IP = 1 << 0
    TID = 1 << 1
    TIME = 1 << 2
    ADDR = 1 << 3
    ID = 1 << 6
    CPU = 1 << 7
    STREAM_ID = 1 << 9
    WEIGHT = 1 << 14
    DATA_SRC = 1 << 15
    IDENTIFIER = 1 << 16
    PHYS_ADDR = 1 << 19


class AttrFlag(IntFlag):
    """Bits of the flag word of `perf_event_attr`."""

    DISABLED = 1 << 0
    INHERIT = 1 << 1
    EXCLUDE_USER = 1 << 4
    EXCLUDE_KERNEL = 1 << 5
    EXCLUDE_HV = 1 << 6
    MMAP = 1 << 8
    COMM = 1 << 9
    TASK = 1 << 13
    SAMPLE_ID_ALL = 1 << 18
    EXCLUDE_HOST = 1 << 19
    EXCLUDE_GUEST = 1 << 20
    MMAP2 = 1 << 23
    COMM_EXEC = 1 << 24
    CONTEXT_SWITCH = 1 << 26


class SpeConfig(IntFlag):
    """Bits of `attr.config` of arm_spe_N (spe.md 3.1)."""

    TS = 1 << 0
    PA = 1 << 1
    PCT = 1 << 2
    JITTER = 1 << 16
    BRANCH = 1 << 32
    LOAD = 1 << 33
    STORE = 1 << 34
    DISCARD = 1 << 35


class Feature(IntEnum):
    """Sections after the data, by their bit in the header."""

    BUILD_ID = 2
    HOSTNAME = 3
    OSRELEASE = 4
    VERSION = 5
    ARCH = 6
    NRCPUS = 7
    CPUDESC = 8
    CPUID = 9
    TOTAL_MEM = 10
    CMDLINE = 11
    EVENT_DESC = 12
    PMU_MAPPINGS = 16
    AUXTRACE = 18


TEXT_FEATURES = (
    Feature.HOSTNAME, Feature.OSRELEASE, Feature.VERSION, Feature.ARCH, Feature.CPUDESC, Feature.CPUID,
)  # fmt: skip


# ---- bodies of records -----------------------------------------------------------------------------------------------


class Mmap(NamedTuple):
    pid: int
    tid: int
    start: int
    length: int
    page_offset: int
    name: str


class Mmap2(NamedTuple):
    pid: int
    tid: int
    start: int
    length: int
    page_offset: int
    identity: bytes  # 24: u32 major, minor; u64 inode, generation. Or u8 size, 3 reserved, u8[20] build id (Misc)
    protection: int
    flags: int
    name: str


class Lost(NamedTuple):
    id: int
    lost: int


class LostSamples(NamedTuple):
    lost: int


class Comm(NamedTuple):
    pid: int
    tid: int
    name: str


class Task(NamedTuple):
    """EXIT and FORK."""

    pid: int
    parent_pid: int
    tid: int
    parent_tid: int
    time: int


class Aux(NamedTuple):
    offset: int  # in the stream of the AUX area, bytes
    size: int
    flags: int


class ItraceStart(NamedTuple):
    pid: int
    tid: int


class Switch(NamedTuple):
    """SWITCH_CPU_WIDE: who comes next (switched out) or was before (switched in)."""

    pid: int
    tid: int


class TimeConv(NamedTuple):
    """How to turn ticks of the generic counter into perf's ns; see `spepolicy.perfdata.clock`."""

    shift: int
    multiplier: int
    zero: int
    cycles: int = 0
    mask: int = 0
    cap_zero: int = 1
    cap_short: int = 0


class AuxtraceInfo(NamedTuple):
    kind: int  # ARM_SPE
    reserved: int
    words: tuple[int, ...]


class Auxtrace(NamedTuple):
    """A piece of the AUX area; its bytes follow the record and are not counted in the record's size."""

    size: int
    offset: int
    reference: int
    queue: int
    tid: int
    cpu: int
    reserved: int


class AuxtraceError(NamedTuple):
    kind: int  # 1: PERF_AUXTRACE_ERROR_ITRACE
    code: int
    cpu: int
    pid: int
    tid: int
    version: int  # 1: with time; 2: with machine_pid and vcpu as well
    ip: int
    time: int
    message: str
    machine_pid: int
    vcpu: int


class Layout(NamedTuple):
    """A body: NamedTuple, struct format of its fixed part, and what its last field is if that is not in the format."""

    body: type[Any]
    format: struct.Struct
    tail: str = ""  # "text": to the end, NUL-padded; "words": u64 to the end


LAYOUTS: dict[Type, Layout] = {
    Type.MMAP: Layout(Mmap, struct.Struct("<iiQQQ"), "text"),
    Type.MMAP2: Layout(Mmap2, struct.Struct("<iiQQQ24sII"), "text"),
    Type.LOST: Layout(Lost, struct.Struct("<QQ")),
    Type.LOST_SAMPLES: Layout(LostSamples, struct.Struct("<Q")),
    Type.COMM: Layout(Comm, struct.Struct("<ii"), "text"),
    Type.EXIT: Layout(Task, struct.Struct("<iiiiQ")),
    Type.FORK: Layout(Task, struct.Struct("<iiiiQ")),
    Type.AUX: Layout(Aux, struct.Struct("<QQQ")),
    Type.ITRACE_START: Layout(ItraceStart, struct.Struct("<ii")),
    Type.SWITCH_CPU_WIDE: Layout(Switch, struct.Struct("<ii")),
    Type.TIME_CONV: Layout(TimeConv, struct.Struct("<QQQQQBB6x")),
    Type.AUXTRACE_INFO: Layout(AuxtraceInfo, struct.Struct("<II"), "words"),
    Type.AUXTRACE: Layout(Auxtrace, struct.Struct("<QQQIiiI")),
    Type.AUXTRACE_ERROR: Layout(AuxtraceError, struct.Struct("<IIiiiIQQ64sII")),
}
TIME_CONV_SHORT = struct.Struct("<QQQ")  # before Linux 5.9: without cap_user_time_short
AUXTRACE_ERROR_V1 = struct.Struct("<IIiiiIQQ64s")


def text_of(raw: bytes | memoryview) -> str:
    """Return the text before the first NUL; bytes that are not UTF-8 are kept as escapes."""
    return bytes(raw).partition(b"\0")[0].decode("utf-8", "backslashreplace")


def parse_body(kind: Type, body: memoryview) -> Any:
    """Return *body* (trailer included, where the record has one) as the tuple of `LAYOUTS`.

    Raises ValueError if it is too short.
    """
    layout = LAYOUTS[kind]
    short = None
    if kind is Type.TIME_CONV and len(body) < layout.format.size:
        short = TIME_CONV_SHORT
    if kind is Type.AUXTRACE_ERROR and len(body) < layout.format.size:
        short = AUXTRACE_ERROR_V1
    form = short or layout.format
    if len(body) < form.size:
        raise ValueError(f"its body has {len(body)} bytes and must have {form.size}")
    values: list[Any] = list(form.unpack_from(body))
    if kind is Type.AUXTRACE_ERROR:
        values = [*values[:8], text_of(values[8]), *(values[9:] or (0, 0))]
    rest = body[form.size :]
    if layout.tail == "text":
        values.append(text_of(rest))
    elif layout.tail == "words":
        values.append(struct.unpack_from(f"<{len(rest) // 8}Q", rest))
    return layout.body(*values)


def pack_body(kind: Type, body: Any) -> bytes:
    """Return the bytes of *body*, a tuple of the class that `LAYOUTS` gives for *kind*; text is NUL-padded to 8."""
    layout = LAYOUTS[kind]
    values = list(body)
    tail = values.pop() if layout.tail else None
    if kind is Type.AUXTRACE_ERROR:
        values[8] = str(values[8]).encode()[:63]  # MAX_AUXTRACE_ERROR_MSG with its NUL
    raw = layout.format.pack(*values)
    if layout.tail == "text":
        raw += padded_text(str(tail))
    elif layout.tail == "words":
        assert tail is not None
        raw += struct.pack(f"<{len(tail)}Q", *tail)
    return raw


def padded_text(text: str) -> bytes:
    """Return *text* with at least one NUL, padded to a multiple of 8 bytes."""
    raw = text.encode("utf-8", "surrogateescape") + b"\0"
    return raw + bytes(-len(raw) % 8)


# ---- the trailer -----------------------------------------------------------------------------------------------------


class SampleId(NamedTuple):
    """Who, when and where; -1 for what the trailer does not hold. `time` in ns, `id` that of the event."""

    pid: int = -1
    tid: int = -1
    time: int = -1
    cpu: int = -1
    id: int = -1


def sample_id_bytes(sample_type: int) -> int:
    """Return the size of the trailer that events of *sample_type* have."""
    fields = (SampleType.TID, SampleType.TIME, SampleType.ID, SampleType.STREAM_ID, SampleType.CPU)
    return 8 * sum(bool(sample_type & bit) for bit in (*fields, SampleType.IDENTIFIER))


def parse_sample_id(sample_type: int, record: memoryview) -> SampleId:
    """Return the trailer at the end of *record*; all -1 if it is too short to have one."""
    size = sample_id_bytes(sample_type)
    if size > len(record):
        return SampleId()
    words = struct.unpack_from(f"<{size // 8}Q", record, len(record) - size)
    found = {}
    n = 0
    for bit in (SampleType.TID, SampleType.TIME, SampleType.ID, SampleType.STREAM_ID, SampleType.CPU):
        if sample_type & bit:
            found[bit] = words[n]
            n += 1
    tids = found.get(SampleType.TID)
    cpu = found.get(SampleType.CPU)
    number = words[n] if sample_type & SampleType.IDENTIFIER else found.get(SampleType.ID, -1)
    return SampleId(
        pid=-1 if tids is None else _signed(tids & 0xFFFFFFFF),
        tid=-1 if tids is None else _signed(tids >> 32),
        time=found.get(SampleType.TIME, -1),
        cpu=-1 if cpu is None else _signed(cpu & 0xFFFFFFFF),
        id=number,
    )


def pack_sample_id(sample_type: int, who: SampleId) -> bytes:
    """Return the trailer that events of *sample_type* have."""
    raw = b""
    if sample_type & SampleType.TID:
        raw += struct.pack("<ii", who.pid, who.tid)
    if sample_type & SampleType.TIME:
        raw += struct.pack("<Q", who.time)
    if sample_type & SampleType.ID:
        raw += struct.pack("<Q", who.id)
    if sample_type & SampleType.STREAM_ID:
        raw += struct.pack("<Q", who.id)
    if sample_type & SampleType.CPU:
        raw += struct.pack("<iI", who.cpu, 0)
    if sample_type & SampleType.IDENTIFIER:
        raw += struct.pack("<Q", who.id)
    return raw


def _signed(value: int) -> int:
    return value - (1 << 32) if value & (1 << 31) else value
