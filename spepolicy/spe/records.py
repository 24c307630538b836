"""One dtype for an SPE record: all that a record of any version can say, field by field, without loss.

`RECORD` is a row per record: what `spepolicy.spe.packets` makes from bytes and turns into bytes, what a perf.data file
is written from and read into. A field means something only where its bit of `present` is set, and is 0 elsewhere; so
two records are equal if their rows are. Packets that have no field of their own (IMPLEMENTATION DEFINED indices,
packets of later versions) are rows of `EXTRA` that name their record.

*Addresses* are canonical: bits 63:56 repeat bit 55, which chooses between TTBR0 and TTBR1. An address packet has bits
55:0 alone (spe.md 4.2). perf instead sets them for Non-secure EL1 and EL2, and clears them elsewhere: the two differ
for a low address at EL1.

*Sources*: Arm ARM DDI 0487 M.a.a chapter D18 as restated in spe.md 4; index and bit names are those of that chapter.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXTRA", "RECORD", "OpClass", "Present", "Security", "new_records"]


class Present(IntFlag):
    """Bits of `RECORD.present`: which packets the record has."""

    PC = 1 << 0
    """`pc`, `pc_el`, `pc_security`: Address packet 0."""
    TARGET = 1 << 1
    """`target`...: where the branch went, Address packet 1."""
    VA = 1 << 2
    """`va`, `va_tag`: Address packet 2."""
    PA = 1 << 3
    """`pa`, `pa_security`, `pa_tag`, `pa_checked`: Address packet 3."""
    PREVIOUS_TARGET = 1 << 4
    """`previous`...: target of the taken branch before, Address packet 4 (FEAT_SPE_PBT)."""
    TOTAL = 1 << 5
    """`total_latency`: Counter packet 0."""
    ISSUE = 1 << 6
    """`issue_latency`: Counter packet 1."""
    TRANSLATION = 1 << 7
    """`translation_latency`: Counter packet 2."""
    ALTERNATE_ISSUE = 1 << 8
    """`alternate_latency`: Counter packet 4 (FEAT_SPE_ALTCLK)."""
    DATA_SOURCE = 1 << 9
    """`data_source`, `data_source_bytes`."""
    CONTEXT_EL1 = 1 << 10
    """`context_el1`: CONTEXTIDR_EL1."""
    CONTEXT_EL2 = 1 << 11
    """`context_el2`: CONTEXTIDR_EL2."""
    OPERATION = 1 << 12
    """`op_class`, `op`."""
    EVENTS = 1 << 13
    """`events`, `events_bytes`. Every record that the architecture allows has them."""
    TIMESTAMP = 1 << 14
    """`timestamp`. The record ends with it; without it, with an End packet."""
    EXTRA = 1 << 15
    """Further packets: rows of `EXTRA`."""


class OpClass(IntEnum):
    """`RECORD.op_class`, bits 1:0 of the header of an Operation Type packet."""

    OTHER = 0
    LOAD_STORE = 1
    BRANCH = 2


class Security(IntEnum):
    """`pc_security` and its like: NSE << 1 | NS of an address. The fourth value is reserved."""

    SECURE = 0
    NON_SECURE = 1
    REALM = 3


RECORD = np.dtype(
    [
        ("offset", "u8"),  # of its first byte in the stream
        ("timestamp", "u8"),  # ticks of the generic timer
        ("pc", "u8"),  # virtual address of the instruction
        ("target", "u8"),  # virtual address
        ("previous", "u8"),  # virtual address
        ("va", "u8"),  # of the data
        ("pa", "u8"),  # bits 55:0, of the data
        ("events", "u8"),  # bits of the Events packet (spe.md 4.3)
        ("present", "u4"),  # `Present`
        ("context_el1", "u4"),
        ("context_el2", "u4"),
        ("total_latency", "u2"),  # cycles, saturated at 0xfff or 0xffff by PMSIDR_EL1.CountSize
        ("issue_latency", "u2"),  # cycles
        ("translation_latency", "u2"),  # cycles
        ("alternate_latency", "u2"),  # cycles of the alternate clock
        ("data_source", "u2"),  # IMPLEMENTATION DEFINED
        ("size", "u2"),  # bytes to the end of its last packet, without padding behind it
        # Bits that the architecture has as zero, and real streams have not always: 3:0 bits 59:56 of the PC, 7:4 of the
        # target, 11:8 of the previous target, 12 bit 61 of the PA.
        ("reserved", "u2"),
        ("pc_el", "u1"),  # exception level
        ("pc_security", "u1"),  # `Security`
        ("target_el", "u1"),
        ("target_security", "u1"),
        ("previous_el", "u1"),
        ("previous_security", "u1"),
        ("va_tag", "u1"),  # bits 63:56 of the packet: the address tag, or what the PE gives in its place
        ("pa_security", "u1"),
        ("pa_tag", "u1"),  # PAT, the allocation tag of FEAT_MTE2
        ("pa_checked", "u1"),  # CH: the access was tag-checked
        ("op_class", "u1"),  # `OpClass`
        ("op", "u1"),  # payload of the Operation Type packet (`spepolicy.spe.operations`)
        ("events_bytes", "u1"),  # 1, 2, 4 or 8: an implementation's choice
        ("data_source_bytes", "u1"),  # 1 or 2
    ]
)

EXTRA = np.dtype(
    [
        ("value", "u8"),  # payload, little-endian, zero-extended
        ("record_index", "u4"),
        # First byte of the header; of an extended one also the second, in bits 15:8. It implies the payload's size.
        ("header", "u2"),
        ("zero", "u2"),
    ]
)


def new_records(count: int) -> NDArray[Any]:
    """Return *count* rows of `RECORD` in which nothing is present."""
    return np.zeros(count, RECORD)
