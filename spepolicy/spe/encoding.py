"""The compiled encoder: checks records, sizes them and writes their packets. `spepolicy.spe.packets.encode` is its
front.

All that is compiled is in this file, as numba's cache looks at no other (`spepolicy.jit`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import entry, lean, row
from spepolicy.spe.decoding import MAX_SIZE
from spepolicy.spe.headers import Kind
from spepolicy.spe.records import Present

__all__ = ["NEOVERSE_BYTES", "WRONG", "encode_into", "measure"]

# The compiled types of all numbers here; to the type checker they are numbers of any kind.
_wide: Any = np.int64
_word: Any = np.uint64

_PC = int(Present.PC)
_TARGET = int(Present.TARGET)
_VA = int(Present.VA)
_PA = int(Present.PA)
_PREVIOUS_TARGET = int(Present.PREVIOUS_TARGET)
_TOTAL = int(Present.TOTAL)
_ISSUE = int(Present.ISSUE)
_TRANSLATION = int(Present.TRANSLATION)
_ALTERNATE_ISSUE = int(Present.ALTERNATE_ISSUE)
_DATA_SOURCE = int(Present.DATA_SOURCE)
_CONTEXT_EL1 = int(Present.CONTEXT_EL1)
_CONTEXT_EL2 = int(Present.CONTEXT_EL2)
_OPERATION = int(Present.OPERATION)
_EVENTS = int(Present.EVENTS)
_TIMESTAMP = int(Present.TIMESTAMP)
_EXTRA = int(Present.EXTRA)
_ALL = sum(int(bit) for bit in Present)
_INDEXED = int(Kind.INDEXED)
_UNKNOWN = int(Kind.UNKNOWN)

NEOVERSE_BYTES = 64
"""Size of each record of Arm's Neoverse cores, whatever it holds (perfdata.md 7: four independent real sources)."""
_NOT_NEOVERSE = _PREVIOUS_TARGET | _ALTERNATE_ISSUE | _EXTRA

WRONG = {
    1: "'present' has no EVENTS bit. Rule: every record has an Events packet (Arm ARM D17.6.10)",
    2: "'present' has a bit that means nothing. Rule: bits of spepolicy.spe.records.Present",
    3: "'events' does not fit 'events_bytes'. Rule: events_bytes is 1, 2, 4 or 8, events below 2**(8 * events_bytes)",
    4: "'data_source' does not fit 'data_source_bytes'. Rule: data_source_bytes is 1 or 2",
    5: "'op_class' is above 2. Rule: other, load and store, or branch",
    6: "an address is not canonical. Rule: bits 63:56 repeat bit 55; the tag of a data address goes into 'va_tag'",
    7: "an exception level, a security state or bits of 'reserved' are out of range. Rule: 0 to 3; below 2**13",
    8: "'pa', 'pa_tag' or 'pa_checked' is out of range. Rule: below 2**56, 16 and 2",
    9: "the EXTRA bit of 'present' and the rows of 'extra' disagree. Rule: the bit is set if there are rows",
    10: "a row of 'extra' is not a packet that needs one. Rule: a header without a field in RECORD, a value that fits "
    "its size",
    11: f"it takes more than {MAX_SIZE} bytes. Rule: the largest record of the architecture (PMSIDR_EL1.MaxSize)",
    12: "it does not fit a record of 64 bytes with fixed places. Rule: no previous target, alternate latency or "
    "further packets; a target or a data address; 2 bytes of events, 1 of data source",
}
"""What `measure` finds wrong with a record."""


@lean
def _canonical(address: Any) -> bool:
    return _word((_wide(address) << 8) >> 8) == address


@lean
def _fits(value: Any, size: int) -> bool:
    return size == 8 or _word(value) >> _word(8 * size) == 0


@lean
def _sizes_of_extra(header: int, size_of: Any, kind_of: Any) -> int:
    """Return the bytes of a packet that has a row of EXTRA, or -1 if its header is not one of those."""
    first = header & 0xFF
    second = header >> 8
    if 0x20 <= first < 0x40:
        short = first == 0x20 and second >= 0x98 and kind_of[second] != _UNKNOWN
        return -1 if short else 2 + (1 << (second >> 4 & 3))
    known = kind_of[first] != _UNKNOWN and kind_of[first] != _INDEXED
    return -1 if known or second != 0 else 1 + size_of[first]


@lean
def _wrong(r: Any, present: int) -> int:
    """Return what is wrong with the fields of a record, a key of `WRONG`, or 0."""
    if present & _EVENTS == 0:
        return 1
    if present & ~_ALL != 0:
        return 2
    size = _wide(r.events_bytes)
    if (size != 1 and size != 2 and size != 4 and size != 8) or not _fits(r.events, size):
        return 3
    size = _wide(r.data_source_bytes)
    if present & _DATA_SOURCE != 0 and ((size != 1 and size != 2) or not _fits(r.data_source, size)):
        return 4
    if present & _OPERATION != 0 and r.op_class > 2:
        return 5
    if present & _PC != 0 and not _canonical(r.pc):
        return 6
    if present & _TARGET != 0 and not _canonical(r.target):
        return 6
    if present & _PREVIOUS_TARGET != 0 and not _canonical(r.previous):
        return 6
    if present & _VA != 0 and not _canonical(r.va):
        return 6
    states = r.pc_el | r.pc_security | r.target_el | r.target_security | r.previous_el | r.previous_security
    if (states | r.pa_security) > 3 or r.reserved >= 1 << 13:
        return 7
    if present & _PA != 0 and (not _fits(r.pa, 7) or r.pa_tag > 15 or r.pa_checked > 1):
        return 8
    return 0


@lean
def _record_bytes(r: Any, present: int) -> int:
    """Return the bytes of a record without its extra packets and without padding."""
    addresses = (present & 1) + (present >> 1 & 1) + (present >> 2 & 1) + (present >> 3 & 1) + (present >> 4 & 1)
    counters = (present >> 5 & 1) + (present >> 6 & 1) + (present >> 7 & 1) + (present >> 8 & 1)
    contexts = (present >> 10 & 1) + (present >> 11 & 1)
    size = 9 * addresses + 3 * counters + 5 * contexts + 2 * (present >> 12 & 1) + 1 + _wide(r.events_bytes)
    if present & _DATA_SOURCE != 0:
        size += 1 + _wide(r.data_source_bytes)
    return size + 1 + 8 * (present >> 14 & 1)


@entry
def measure(
    records: NDArray[Any],
    extra: NDArray[Any],
    first: int,
    size_of: NDArray[Any],
    kind_of: NDArray[Any],
    at: int,
    align: int,
    neoverse: bool,
) -> tuple[int, int, int]:
    """Return the bytes that `encode_into` will write; or, for the first wrong record, its index and a key of `WRONG`.

    :param first: index of `records[0]` to *extra*.
    :param at: where in the stream the records begin.
    :returns: (bytes, -1, 0) or (0, index, what).
    """
    begin = at
    cursor = 0
    for i in range(len(records)):
        r = row(records, i)
        present = _wide(r.present)
        what = _wrong(r, present)
        if what != 0:
            return 0, first + i, what
        size = _record_bytes(r, present)
        had = cursor
        while cursor < len(extra) and row(extra, cursor).record_index == first + i:
            more = row(extra, cursor)
            packet = _sizes_of_extra(_wide(more.header), size_of, kind_of)
            if packet < 0:
                return 0, first + i, 10
            payload = packet - (2 if 0x20 <= more.header & 0xFF < 0x40 else 1)
            if (payload == 0 and more.value != 0) or (payload > 0 and not _fits(more.value, payload)):
                return 0, first + i, 10
            size += packet
            cursor += 1
        if (present & _EXTRA != 0) != (cursor > had):
            return 0, first + i, 9
        if size > MAX_SIZE:
            return 0, first + i, 11
        if neoverse:
            both = _VA | _TARGET
            if present & _NOT_NEOVERSE != 0 or present & both == both or r.events_bytes != 2:
                return 0, first + i, 12
            if present & _DATA_SOURCE != 0 and r.data_source_bytes != 1:
                return 0, first + i, 12
            size = NEOVERSE_BYTES
        at += size
        if align > 1:
            at = (at + align - 1) // align * align
    return at - begin, -1, 0


@lean
def _put(out: Any, words: Any, at: int, header: int, size: int, value: Any) -> int:
    """Write a packet with a one-byte header; up to 8 bytes behind it become 0. Return where it ends."""
    out[at] = header
    words[at + 1] = _word(value)
    return at + 1 + size


@lean
def _address(address: Any, el: Any, security: Any, reserved: Any) -> Any:
    """Return the payload of an address packet for the PC or a target."""
    security = _word(security)
    top = _word(reserved) | (security & _word(2)) << _word(3) | _word(el) << _word(5)
    top |= (security & _word(1)) << _word(7)
    return _word(address) & _word(0x00FF_FFFF_FFFF_FFFF) | top << _word(56)


@lean
def _pc(r: Any) -> Any:
    return _address(r.pc, r.pc_el, r.pc_security, r.reserved & 0xF)


@lean
def _target(r: Any) -> Any:
    return _address(r.target, r.target_el, r.target_security, r.reserved >> 4 & 0xF)


@lean
def _va(r: Any) -> Any:
    return _word(r.va) & _word(0x00FF_FFFF_FFFF_FFFF) | _word(r.va_tag) << _word(56)


@lean
def _pa(r: Any) -> Any:
    el = _wide(r.pa_checked) << 1 | _wide(r.reserved) >> 12 & 1
    return _address(r.pa, el, r.pa_security, r.pa_tag)


@lean
def _events_header(size: int) -> int:
    return 0x42 if size == 1 else 0x52 if size == 2 else 0x62 if size == 4 else 0x72


@lean
def _put_in_order(out: Any, words: Any, at: int, r: Any, present: int) -> int:
    """Write what precedes the data source, in the order of Arm's pseudocode (spe.md rule 27)."""
    if present & _CONTEXT_EL1 != 0:
        at = _put(out, words, at, 0x64, 4, r.context_el1)
    if present & _CONTEXT_EL2 != 0:
        at = _put(out, words, at, 0x65, 4, r.context_el2)
    if present & _TOTAL != 0:
        at = _put(out, words, at, 0x98, 2, r.total_latency)
    if present & _ISSUE != 0:
        at = _put(out, words, at, 0x99, 2, r.issue_latency)
    if present & _TRANSLATION != 0:
        at = _put(out, words, at, 0x9A, 2, r.translation_latency)
    if present & _ALTERNATE_ISSUE != 0:
        at = _put(out, words, at, 0x9C, 2, r.alternate_latency)
    if present & _PC != 0:
        at = _put(out, words, at, 0xB0, 8, _pc(r))
    if present & _TARGET != 0:
        at = _put(out, words, at, 0xB1, 8, _target(r))
    if present & _VA != 0:
        at = _put(out, words, at, 0xB2, 8, _va(r))
    if present & _PA != 0:
        at = _put(out, words, at, 0xB3, 8, _pa(r))
    if present & _PREVIOUS_TARGET != 0:
        payload = _address(r.previous, r.previous_el, r.previous_security, r.reserved >> 8 & 0xF)
        at = _put(out, words, at, 0xB4, 8, payload)
    return at


@lean
def _put_end(out: Any, words: Any, at: int, r: Any, present: int) -> int:
    """Write data source, operation, events, and the timestamp or the end."""
    if present & _DATA_SOURCE != 0:
        size = _wide(r.data_source_bytes)
        at = _put(out, words, at, 0x43 if size == 1 else 0x53, size, r.data_source)
    if present & _OPERATION != 0:
        at = _put(out, words, at, 0x48 | _wide(r.op_class), 1, r.op)
    size = _wide(r.events_bytes)
    at = _put(out, words, at, _events_header(size), size, r.events)
    if present & _TIMESTAMP != 0:
        return _put(out, words, at, 0x71, 8, r.timestamp)
    return _put(out, words, at, 0x01, 0, 0)


@lean
def _put_in_slots(out: Any, words: Any, at: int, r: Any, present: int) -> None:
    """Write a record whose packets have fixed places, zero where absent: Neoverse N1 (perfdata.md 7).

    The place of CONTEXTIDR_EL1, free in all real records seen, is an inference from its size.
    """
    if present & _PC != 0:
        _put(out, words, at, 0xB0, 8, _pc(r))
    if present & _CONTEXT_EL1 != 0:
        _put(out, words, at + 0x09, 0x64, 4, r.context_el1)
    if present & _CONTEXT_EL2 != 0:
        _put(out, words, at + 0x0E, 0x65, 4, r.context_el2)
    if present & _OPERATION != 0:
        _put(out, words, at + 0x13, 0x48 | _wide(r.op_class), 1, r.op)
    _put(out, words, at + 0x15, 0x52, 2, r.events)
    if present & _ISSUE != 0:
        _put(out, words, at + 0x18, 0x99, 2, r.issue_latency)
    if present & _TOTAL != 0:
        _put(out, words, at + 0x1B, 0x98, 2, r.total_latency)
    if present & _VA != 0:
        _put(out, words, at + 0x1E, 0xB2, 8, _va(r))
    elif present & _TARGET != 0:
        _put(out, words, at + 0x1E, 0xB1, 8, _target(r))
    if present & _TRANSLATION != 0:
        _put(out, words, at + 0x27, 0x9A, 2, r.translation_latency)
    if present & _PA != 0:
        _put(out, words, at + 0x2A, 0xB3, 8, _pa(r))
    if present & _DATA_SOURCE != 0:
        _put(out, words, at + 0x33, 0x43, 1, r.data_source)
    if present & _TIMESTAMP != 0:
        _put(out, words, at + 0x37, 0x71, 8, r.timestamp)
    else:
        out[at + 0x3F] = 0x01


@entry
def encode_into(
    out: NDArray[Any],
    words: NDArray[Any],
    records: NDArray[Any],
    extra: NDArray[Any],
    first: int,
    size_of: NDArray[Any],
    begin: int,
    align: int,
    neoverse: bool,
) -> None:
    """Write the packets of records that `measure` found right, from `out[0]` on, which is byte *begin* of the stream.

    :param out: uint8[bytes + 8]; *words* is uint64[bytes + 1], the eight bytes from each offset on.
    """
    at = _wide(0)
    cursor = 0
    for i in range(len(records)):
        r = row(records, i)
        present = _wide(r.present)
        if neoverse:
            for place in range(0, NEOVERSE_BYTES, 8):
                words[at + place] = _word(0)
            _put_in_slots(out, words, at, r, present)
            at += NEOVERSE_BYTES
        else:
            at = _put_in_order(out, words, at, r, present)
            while cursor < len(extra) and row(extra, cursor).record_index == first + i:
                more = row(extra, cursor)
                header = _wide(more.header)
                size = size_of[header & 0xFF]
                if 0x20 <= header & 0xFF < 0x40:
                    size = _wide(1) << (header >> 12 & 3)
                    out[at] = header & 0xFF
                    at += 1
                    header >>= 8
                at = _put(out, words, at, header & 0xFF, size, more.value)
                cursor += 1
            at = _put_end(out, words, at, r, present)
        if align > 1:
            padded = (begin + at + align - 1) // align * align - begin
            while at < padded:
                out[at] = 0
                at += 1
