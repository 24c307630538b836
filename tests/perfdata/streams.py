"""Hand-made SPE bytes and files for the tests of perf.data: packets spelled out, not encoded by the code under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from spepolicy.perfdata.clock import conversion
from spepolicy.perfdata.layout import Aux, AuxFlag, Comm, Feature, SampleId, SpeConfig, TimeConv, Type
from spepolicy.perfdata.writer import Writer, dummy_event, spe_event

CLOCK = conversion(25_000_000)
NEOVERSE_N1 = "0x00000000413fd0c1"
SPE_ID, DUMMY_ID = 100, 101


def load(pc: int, ticks: int, *, va: int = 0x7000, pa: int = 0x8000, total: int = 100, tid: int = 1000) -> bytes:
    """Return a load by a Neoverse N1: 64 bytes, packets in its fixed slots (perfdata.md 7)."""
    raw = b"\xb0" + struct.pack("<Q", pc & ((1 << 56) - 1) | 0x80 << 56)  # Non-secure EL0
    raw = raw.ljust(0x0E, b"\0") + b"\x64" + struct.pack("<I", tid)
    raw += b"\x49\x00" + b"\x52\x16\x00" + b"\x99\x0a\x00" + b"\x98" + struct.pack("<H", total)
    raw += b"\xb2" + struct.pack("<Q", va) + b"\x9a\x01\x00" + b"\xb3" + struct.pack("<Q", pa | 1 << 63) + b"\x43\x08"
    return raw.ljust(0x37, b"\0") + b"\x71" + struct.pack("<Q", ticks)


def branch(pc: int, target: int, ticks: int) -> bytes:
    """Return a mispredicted conditional branch at EL1, without context, padded to 64 bytes at its end."""
    raw = b"\xb0" + struct.pack("<Q", pc & ((1 << 56) - 1) | 0xA0 << 56)
    raw += b"\x4a\x01" + b"\x52\x82\x00" + b"\x98\x05\x00" + b"\xb1"
    raw += struct.pack("<Q", target & ((1 << 56) - 1) | 0xA0 << 56) + b"\x71" + struct.pack("<Q", ticks)
    return raw.ljust(64, b"\0")


def who(time: int = 0, cpu: int = 0, event: int = DUMMY_ID, tid: int = 1000) -> SampleId:
    """Return a trailer."""
    return SampleId(tid, tid, time, cpu, event)


def writer(clock: TimeConv = CLOCK, **features: str | Sequence[str]) -> Writer:
    """Return a writer that has written what must come first, and a COMM record."""
    given = {Feature[name.upper()]: value for name, value in features.items()}
    events = [spe_event(4096, SpeConfig.TS | SpeConfig.PA | SpeConfig.JITTER, [SPE_ID]), dummy_event([DUMMY_ID])]
    made = Writer(events, {Feature.CPUID: NEOVERSE_N1} | given)
    made.open(clock)
    made.add(Type.COMM, Comm(1000, 1000, "service"), who())
    return made


def add_session(made: Writer, payload: bytes, offset: int = 0, *, flags: int = 0, cpu: int = 0, time: int = 0) -> None:
    """Write a session of the driver: its AUX record and its data."""
    made.add(Type.AUX, Aux(offset, len(payload), AuxFlag(flags)), who(time, cpu, SPE_ID))
    made.add_aux_data(payload, offset=offset, cpu=cpu)


def two_sessions() -> bytes:
    """Return a file with four loads and two branches in two sessions on CPU 0."""
    made = writer(hostname="guest", cmdline=["perf", "record", "-e", "arm_spe_0//"])
    first = b"".join(load(0x40_1000 + 4 * n, 1000 + 10 * n, va=0x1000 * n, total=100 + n) for n in range(4))
    second = branch(0xFFFF_8000_0800_0010, 0xFFFF_8000_0800_0100, 2000) + branch(0x10, 0x20, 2050)
    add_session(made, first, time=45_000)
    made.finish_round()
    add_session(made, second, len(first), flags=AuxFlag.TRUNCATED, time=85_000)
    made.finish_round()
    made.finish_round()
    return made.content()
