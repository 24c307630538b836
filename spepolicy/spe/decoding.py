"""The compiled decoder: one pass over the bytes, one row per record. `spepolicy.spe.packets.decode` is its front.

All that is compiled is in this file, as numba's cache looks at no other (`spepolicy.jit`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import entry, lean, row
from spepolicy.spe.headers import Kind
from spepolicy.spe.records import Present
from spepolicy.spe.report import DamageKind

__all__ = ["MAX_SIZE", "STATE", "STATE_FIELDS", "decode_into"]

MAX_SIZE = 2048
"""Bytes of the largest record that any implementation may write (PMSIDR_EL1.MaxSize, spe.md 1.5)."""

STATE_FIELDS = ("position", "records", "extra", "damage", "padding", "rest")
STATE = {name: index for index, name in enumerate(STATE_FIELDS)}
"""Index of what `decode_into` carries from call to call; all but `position` and `rest` count."""

# The compiled types of all numbers here; to the type checker they are numbers of any kind.
_wide: Any = np.int64
_word: Any = np.uint64

_PADDING = int(Kind.PADDING)
_END = int(Kind.END)
_TIMESTAMP = int(Kind.TIMESTAMP)
_EVENTS = int(Kind.EVENTS)
_DATA_SOURCE = int(Kind.DATA_SOURCE)
_CONTEXT_EL1 = int(Kind.CONTEXT_EL1)
_CONTEXT_EL2 = int(Kind.CONTEXT_EL2)
_OPERATION = int(Kind.OPERATION)
_PC = int(Kind.PC)
_TARGET = int(Kind.TARGET)
_VA = int(Kind.VA)
_PA = int(Kind.PA)
_PREVIOUS_TARGET = int(Kind.PREVIOUS_TARGET)
_TOTAL = int(Kind.TOTAL)
_ISSUE = int(Kind.ISSUE)
_TRANSLATION = int(Kind.TRANSLATION)
_ALTERNATE_ISSUE = int(Kind.ALTERNATE_ISSUE)
_INDEXED = int(Kind.INDEXED)
_EXTENDED = int(Kind.EXTENDED)
_UNKNOWN = int(Kind.UNKNOWN)

_HAS_EVENTS = int(Present.EVENTS)
_HAS_TIMESTAMP = int(Present.TIMESTAMP)
_HAS_EXTRA = int(Present.EXTRA)

_BAD_BYTES = int(DamageKind.BAD_BYTES)
_UNKNOWN_PACKET = int(DamageKind.UNKNOWN_PACKET)
_NO_END = int(DamageKind.NO_END)
_NO_EVENTS = int(DamageKind.NO_EVENTS)


@lean
def _canonical(payload: Any) -> Any:
    """Bits 55:0 of an address packet as a virtual address: bit 55 repeated in bits 63:56."""
    return _word((_wide(payload) << 8) >> 8)


@lean
def _security(payload: Any) -> Any:
    """NSE << 1 | NS: bits 60 and 63 of an address packet."""
    return (payload >> _word(59)) & _word(2) | payload >> _word(63)


@lean
def _take(r: Any, kind: int, header: int, word: Any) -> int:
    """Put a packet that has fields of its own into its record; return its bytes.

    *word* is the eight bytes behind the header, whatever the payload's size. Each branch returns a constant: so the
    processor can go on with the next packet before it has the sizes from a table.
    """
    if kind == _PC:
        r.pc = _canonical(word)
        r.pc_el = (word >> _word(61)) & _word(3)
        r.pc_security = _security(word)
        r.reserved |= (word >> _word(56)) & _word(0xF)
        return 9
    if kind == _EVENTS:
        return _take_events(r, header, word)
    if kind == _ISSUE:
        r.issue_latency = word & _word(0xFFFF)
        return 3
    if kind == _TOTAL:
        r.total_latency = word & _word(0xFFFF)
        return 3
    if kind == _OPERATION:
        r.op_class = header & 3
        r.op = word & _word(0xFF)
        return 2
    if kind == _TIMESTAMP:
        r.timestamp = word
        return 9
    if kind == _VA:
        r.va = _canonical(word)
        r.va_tag = word >> _word(56)
        return 9
    if kind == _TRANSLATION:
        r.translation_latency = word & _word(0xFFFF)
        return 3
    if kind == _PA:
        r.pa = word & _word(0x00FF_FFFF_FFFF_FFFF)
        r.pa_security = _security(word)
        r.pa_tag = (word >> _word(56)) & _word(0xF)
        r.pa_checked = (word >> _word(62)) & _word(1)
        r.reserved |= ((word >> _word(61)) & _word(1)) << _word(12)
        return 9
    if kind == _DATA_SOURCE:
        if header == 0x43:
            r.data_source = word & _word(0xFF)
            r.data_source_bytes = 1
            return 2
        r.data_source = word & _word(0xFFFF)
        r.data_source_bytes = 2
        return 3
    if kind == _TARGET:
        r.target = _canonical(word)
        r.target_el = (word >> _word(61)) & _word(3)
        r.target_security = _security(word)
        r.reserved |= ((word >> _word(56)) & _word(0xF)) << _word(4)
        return 9
    if kind == _CONTEXT_EL1:
        r.context_el1 = word & _word(0xFFFF_FFFF)
        return 5
    if kind == _CONTEXT_EL2:
        r.context_el2 = word & _word(0xFFFF_FFFF)
        return 5
    if kind == _PREVIOUS_TARGET:
        r.previous = _canonical(word)
        r.previous_el = (word >> _word(61)) & _word(3)
        r.previous_security = _security(word)
        r.reserved |= ((word >> _word(56)) & _word(0xF)) << _word(8)
        return 9
    if kind == _ALTERNATE_ISSUE:
        r.alternate_latency = word & _word(0xFFFF)
        return 3
    return 1  # the end


@lean
def _take_events(r: Any, header: int, word: Any) -> int:
    if header == 0x52:
        r.events = word & _word(0xFFFF)
        r.events_bytes = 2
        return 3
    if header == 0x62:
        r.events = word & _word(0xFFFF_FFFF)
        r.events_bytes = 4
        return 5
    if header == 0x72:
        r.events = word
        r.events_bytes = 8
        return 9
    r.events = word & _word(0xFF)
    r.events_bytes = 1
    return 2


@lean
def _payload(stream: Any, words: Any, at: int, size: int) -> Any:
    """Return *size* bytes as an unsigned number. *words* has the eight bytes at each offset that has so many."""
    if at < len(words):
        return words[at] & (_word(0xFFFF_FFFF_FFFF_FFFF) >> _word(64 - 8 * size))
    value = _word(0)
    for i in range(size):
        value |= _word(stream[at + i]) << _word(8 * i)
    return value


@lean
def _report(damage: Any, places: int, kind: int, begin: int, end: int) -> int:
    """Note a damaged place; runs of bad bytes, unknown packets and lone End packets are one. Return the count."""
    if places > 0 and (kind <= _UNKNOWN_PACKET or (kind == _NO_EVENTS and end - begin == 1)):
        last = row(damage, places - 1)
        lone = kind != _NO_EVENTS or last.length == last.count
        if lone and last.kind == kind and _wide(last.offset) + _wide(last.length) == begin:
            last.length += _word(end - begin)
            last.count += _word(1)
            return places
    place = row(damage, places)
    place.offset = begin
    place.length = end - begin
    place.count = 1
    place.kind = kind
    return places + 1


@entry
def decode_into(
    stream: NDArray[Any],
    words: NDArray[Any],
    records: NDArray[Any],
    extra: NDArray[Any],
    damage: NDArray[Any],
    state: NDArray[Any],
    kind_of: NDArray[Any],
    size_of: NDArray[Any],
    present_of: NDArray[Any],
    rows: NDArray[Any],
    max_size: int,
    align: int,
    by_byte: bool,
) -> bool:
    """Decode from `state[position]` on; return False if a table is full and the call must be repeated with larger ones.

    :param stream: uint8[N].
    :param words: uint64[max(N - 7, 0)], the eight bytes from each offset on: a view of *stream* with a stride of 1.
    :param records: RECORD[..]; *rows* is the same memory as uint64[.., 13]. *extra*, *damage*: likewise filled in
        order.
    :param state: int64[len(STATE_FIELDS)].
    :param kind_of, size_of, present_of: the tables of `spepolicy.spe.headers`.
    :param align: a record begins at a multiple of it, perhaps with padding.
    :param by_byte: step over unknown headers byte by byte, not by their size.
    """
    n = len(stream)
    position, found, extras, places, padding = state[0], state[1], state[2], state[3], state[4]
    start = _wide(-1)  # of the open record
    end = _wide(0)  # of its last packet
    limit = _wide(0)  # where it must have ended
    safe = _wide(0)  # the last place where any packet fits that and the stream
    first_extra = extras
    present = _wide(0)
    rest = _wide(n)
    done = True
    r = row(records, 0)
    while position < n:
        if start < 0 and (found >= len(records) or extras + max_size >= len(extra) or places + max_size >= len(damage)):
            done = False
            break
        header = _wide(stream[position])
        kind = _wide(kind_of[header])
        if kind == _PADDING:
            begin = position
            while position < len(words) and words[position] == 0:
                position += 8
            if position < len(words):
                word = words[position]  # count its zero bytes, the lowest first
                if word & _word(0xFFFF_FFFF) == 0:
                    word >>= _word(32)
                    position += 4
                if word & _word(0xFFFF) == 0:
                    word >>= _word(16)
                    position += 2
                if word & _word(0xFF) == 0:
                    position += 1
            else:
                while position < n and stream[position] == 0:
                    position += 1
            if start < 0:
                padding += position - begin
            continue

        bit = present_of[kind]
        if start >= 0 and kind < _INDEXED and present & bit == 0 and position <= safe:
            # Nearly all packets: that they fit is seen without their sizes.
            position += _take(r, kind, header, words[position + 1])
            present |= bit
        else:
            length = _wide(1)
            code = header
            size = size_of[header]
            if 0x20 <= header < 0x40:
                length = 2
                second = _wide(0) if position + 1 >= n else _wide(stream[position + 1])
                size = _wide(1) << (second >> 4 & 3)
                code = header | second << 8
                index = _wide(kind_of[second])
                if kind == _EXTENDED and second >= 0x98 and index != _UNKNOWN:
                    # The lowest eight indices have the one-byte header as well: the packet is the same.
                    kind = index if header == 0x20 else _INDEXED
                    if header == 0x20:
                        code = second
                else:
                    kind = _UNKNOWN
            bad = kind == _UNKNOWN and by_byte
            after = position + length + size
            bit = present_of[kind]
            # The open record ends here without its end: see DamageKind.NO_END.
            if start >= 0 and (bad or present & bit != 0 or after > limit):
                places = _report(damage, places, _NO_END, start, end)
                padding += position - end
                start = _wide(-1)
                extras = first_extra
                continue
            if bad:
                places = _report(damage, places, _BAD_BYTES, position, position + 1)
                position += 1
                continue
            if start < 0:
                start = position
                limit = start + max_size - (start % align if align > 1 else 0)
                safe = min(limit, n) - 9
                present = _wide(0)
                first_extra = extras
                for column in range(13):
                    rows[found, column] = 0
                r = row(records, found)
            if after > n:
                rest = start
                places = _report(damage, places, _NO_END, start, n)
                start = _wide(-1)
                extras = first_extra
                break

            if kind >= _INDEXED:
                more = row(extra, extras)
                more.value = _payload(stream, words, position + length, size) if size > 0 else _word(0)
                more.record_index = found
                more.header = code
                more.zero = 0
                extras += 1
                present |= _HAS_EXTRA
                if kind == _UNKNOWN:
                    places = _report(damage, places, _UNKNOWN_PACKET, position, after)
            else:
                _take(r, kind, code, _payload(stream, words, position + length, size) if size > 0 else _word(0))
                present |= bit
            position = after
        end = position
        if kind in (_END, _TIMESTAMP):
            if present & _HAS_EVENTS == 0:
                places = _report(damage, places, _NO_EVENTS, start, end)
                extras = first_extra
            else:
                r.offset = start
                r.size = end - start
                r.present = present
                found += 1
            start = _wide(-1)
    if start >= 0:
        rest = start
        places = _report(damage, places, _NO_END, start, end)
        padding += n - end
        extras = first_extra
    state[0], state[1], state[2], state[3], state[4], state[5] = position, found, extras, places, padding, rest
    return done
