"""Records and packets that several tests build: hypothesis strategies for records of every kind, packets by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from spepolicy.spe.headers import HEADERS, Kind
from spepolicy.spe.records import EXTRA, Present, new_records

U64 = st.integers(0, 2**64 - 1)
U16 = st.integers(0, 2**16 - 1)
LEVEL = st.integers(0, 3)
# Edges of the address space beside anything else: both halves, and the bit that tells them apart.
ADDRESS = st.one_of(st.sampled_from([0, 2**55 - 1, 2**55, 2**56 - 1]), st.integers(0, 2**56 - 1)).map(
    lambda low: low | (0xFF << 56 if low >> 55 else 0)
)
DEFINED = {header.value for header in HEADERS if header.kind not in (Kind.INDEXED, Kind.UNKNOWN)}
FIELDS: dict[Present, dict[str, st.SearchStrategy[int]]] = {
    Present.PC: {"pc": ADDRESS, "pc_el": LEVEL, "pc_security": LEVEL},
    Present.TARGET: {"target": ADDRESS, "target_el": LEVEL, "target_security": LEVEL},
    Present.PREVIOUS_TARGET: {"previous": ADDRESS, "previous_el": LEVEL, "previous_security": LEVEL},
    Present.VA: {"va": ADDRESS, "va_tag": st.integers(0, 255)},
    Present.PA: {
        "pa": st.integers(0, 2**56 - 1),
        "pa_security": LEVEL,
        "pa_tag": st.integers(0, 15),
        "pa_checked": st.integers(0, 1),
    },
    Present.TOTAL: {"total_latency": U16},
    Present.ISSUE: {"issue_latency": U16},
    Present.TRANSLATION: {"translation_latency": U16},
    Present.ALTERNATE_ISSUE: {"alternate_latency": U16},
    Present.CONTEXT_EL1: {"context_el1": st.integers(0, 2**32 - 1)},
    Present.CONTEXT_EL2: {"context_el2": st.integers(0, 2**32 - 1)},
    Present.OPERATION: {"op_class": st.integers(0, 2), "op": st.integers(0, 255)},
    Present.TIMESTAMP: {"timestamp": U64},
}
RESERVED = {Present.PC: 0xF, Present.TARGET: 0xF0, Present.PREVIOUS_TARGET: 0xF00, Present.PA: 0x1000}


@st.composite
def further_packet(draw: st.DrawFn) -> tuple[int, int]:
    """Header and payload of a packet without fields of its own: other indices, and headers that nothing defines."""
    kind = draw(st.sampled_from(["address", "counter", "unknown", "unknown extended"]))
    if kind in ("address", "counter"):
        base, bits, taken = (0xB0, 64, (0, 1, 2, 3, 4)) if kind == "address" else (0x98, 16, (0, 1, 2, 4))
        index = draw(st.integers(0, 31).filter(lambda i: i not in taken))
        header = base | index & 7
        if index > 7:
            header = 0x20 | index >> 3 | header << 8
        return header, draw(st.integers(0, 2**bits - 1))
    if kind == "unknown":
        known = DEFINED | set(range(0x20, 0x40))
        header = draw(st.integers(0, 255).filter(lambda h: h not in known))
        size = 0 if header < 0x20 else 1 << (header >> 4 & 3)
        return header, draw(st.integers(0, 2 ** (8 * size) - 1))
    first = draw(st.integers(0x20, 0x3F))
    second = draw(st.integers(0, 255).filter(lambda s: not (0x98 <= s < 0xA0 or 0xB0 <= s < 0xB8)))
    return first | second << 8, draw(st.integers(0, 2 ** (8 << (second >> 4 & 3)) - 1))


@st.composite
def one_record(draw: st.DrawFn, *, further: bool = True) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    """A record, as an array of one row, and its further packets."""
    record = new_records(1)
    size = draw(st.sampled_from([1, 2, 4, 8]))
    record["events_bytes"], record["events"] = size, draw(st.integers(0, 2 ** (8 * size) - 1))
    present = Present.EVENTS
    for bit in draw(st.sets(st.sampled_from(sorted(FIELDS)))):
        present |= bit
        for name, strategy in FIELDS[bit].items():
            record[name] = draw(strategy)
    if draw(st.booleans()):
        present |= Present.DATA_SOURCE
        size = draw(st.sampled_from([1, 2]))
        record["data_source_bytes"], record["data_source"] = size, draw(st.integers(0, 2 ** (8 * size) - 1))
    mask = sum(bits for bit, bits in RESERVED.items() if bit in present)
    record["reserved"] = draw(st.sampled_from([0, 0x1FFF, 0x0421])) & mask
    packets = draw(st.lists(further_packet(), max_size=3)) if further and draw(st.integers(0, 3)) == 0 else []
    if packets:
        present |= Present.EXTRA
    record["present"] = int(present)
    return record, packets


@st.composite
def streams(draw: st.DrawFn, *, further: bool = True) -> tuple[NDArray[Any], NDArray[Any]]:
    """RECORD[N] and EXTRA[packets], N up to 8; `offset` and `size` are 0."""
    parts = draw(st.lists(one_record(further=further), max_size=8))
    records = np.concatenate([new_records(0), *(record for record, _ in parts)])
    rows = [(value, index, header, 0) for index, (_, more) in enumerate(parts) for header, value in more]
    return records, np.array(rows, EXTRA)


def packet(header: int, value: int = 0) -> bytes:
    """A packet with a one-byte header."""
    size = 0 if header < 0x20 else 1 << (header >> 4 & 3)
    return bytes([header]) + value.to_bytes(size, "little")


PC_A, PC_B = packet(0xB0, 0x8000_0000_0040_0100), packet(0xB0, 0x8000_0000_0040_0200)
EVENTS = packet(0x52, 0x12)
LOAD = packet(0x49, 0)
PA_PACKET = packet(0xB3, 0x8000_0000_8000_1000)
STAMP = packet(0x71, 1000)
END = packet(0x01)
