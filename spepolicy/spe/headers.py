"""The headers of SPE packets as data, and the tables that the decoder and the encoder are driven by.

A packet is a header of one byte, or of two if its first byte is 0x20 to 0x3f, and a payload of 0, 1, 2, 4 or 8 bytes,
little-endian (Arm ARM DDI 0487 M.a.a D18.1, restated in spe.md 4.1). Bits 5:4 of the header's last byte give the
payload's size, for packets that this version of the architecture does not define as well; below 0x20 there is none.

An *extended* header, 0x20 to 0x23 and then that of an Address or a Counter packet, adds bits 4:3 to the packet's index.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.spe.records import Present

__all__ = ["HEADERS", "KIND_OF", "PRESENT_OF", "SIZE_OF", "Header", "Kind"]


class Kind(IntEnum):
    """What a packet is about; those from `PC` to `ALTERNATE_ISSUE` differ in their index only."""

    PADDING = 0
    END = 1
    TIMESTAMP = 2
    EVENTS = 3
    DATA_SOURCE = 4
    CONTEXT_EL1 = 5
    CONTEXT_EL2 = 6
    OPERATION = 7
    PC = 8
    TARGET = 9
    VA = 10
    PA = 11
    PREVIOUS_TARGET = 12
    TOTAL = 13
    ISSUE = 14
    TRANSLATION = 15
    ALTERNATE_ISSUE = 16
    INDEXED = 17  # an Address or Counter packet whose index has no field in RECORD
    EXTENDED = 18  # first byte of an extended header
    UNKNOWN = 19  # not defined in the version of the architecture that this follows


@dataclass(frozen=True)
class Header:
    """A header of one byte: the packet's kind, and its payload in bytes."""

    value: int
    kind: Kind
    payload: int


def _headers() -> tuple[Header, ...]:
    fixed = [
        (0x00, Kind.PADDING, 0),
        (0x01, Kind.END, 0),
        (0x71, Kind.TIMESTAMP, 8),
        *((0x42 | log2 << 4, Kind.EVENTS, 1 << log2) for log2 in range(4)),
        (0x43, Kind.DATA_SOURCE, 1),
        (0x53, Kind.DATA_SOURCE, 2),
        (0x64, Kind.CONTEXT_EL1, 4),
        (0x65, Kind.CONTEXT_EL2, 4),
        *((0x48 | op_class, Kind.OPERATION, 1) for op_class in range(3)),
    ]
    addresses = {0: Kind.PC, 1: Kind.TARGET, 2: Kind.VA, 3: Kind.PA, 4: Kind.PREVIOUS_TARGET}
    counters = {0: Kind.TOTAL, 1: Kind.ISSUE, 2: Kind.TRANSLATION, 4: Kind.ALTERNATE_ISSUE}
    fixed += [(0xB0 | index, addresses.get(index, Kind.INDEXED), 8) for index in range(8)]
    fixed += [(0x98 | index, counters.get(index, Kind.INDEXED), 2) for index in range(8)]
    fixed += [(0x20 | high, Kind.EXTENDED, 0) for high in range(4)]
    return tuple(Header(*entry) for entry in fixed)


HEADERS = _headers()
"""Every header byte that is defined."""


def _tables() -> tuple[NDArray[Any], NDArray[Any]]:
    kind = np.full(256, Kind.UNKNOWN, np.uint8)
    size = np.array([0 if byte < 0x20 else 1 << (byte >> 4 & 3) for byte in range(256)], np.int64)
    for header in HEADERS:
        kind[header.value] = header.kind
        if header.kind != Kind.EXTENDED:
            assert size[header.value] == header.payload
    return kind, size


KIND_OF, SIZE_OF = _tables()
"""uint8[256] and int64[256]: kind and payload in bytes of a header byte, by the rules above."""

PRESENT_OF = np.zeros(len(Kind), np.int64)
"""int64[kinds]: the bit of `Present` that a packet of a kind sets, 0 for those without one."""

for _bit in Present:
    if _bit != Present.EXTRA:
        PRESENT_OF[Kind[str(_bit.name)]] = _bit
