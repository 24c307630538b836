"""Records that perf compressed (`perf record -z`): the kernel's, never AUX data.

perf writes one zstd stream, flushed now and then, as the bodies of COMPRESSED records, and never ends its frame.
Records may lie over two of them (tools/perf/util/zstd.c, session.c). COMPRESSED2, of newer perf, begins with how many
of its bytes are the stream's and is padded to 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from spepolicy.perfdata.container import Problems, Record, known_type
from spepolicy.perfdata.layout import FIRST_USER_TYPE, HEADER, Type

__all__ = ["compressed_body", "inflate"]

_CHUNK = 1 << 16
_LARGEST = 16  # times the file: perf's records shrink to a quarter; what grows more is hostile
_END_OF_FRAME = b"\x01\x00\x00"  # an empty raw block, the last one (RFC 8878, 3.1.1.2)


def compressed_body(record: Record) -> memoryview:
    """Return the part of the zstd stream that *record* holds. Raises ValueError."""
    if record.kind == Type.COMPRESSED:
        return record.body
    size = int.from_bytes(record.body[:8], "little")
    if len(record.body) < 8 or size > len(record.body) - 8:
        raise ValueError(f"it claims {size} bytes of data and has {max(len(record.body) - 8, 0)}")
    return record.body[8 : 8 + size]


def inflate(parts: list[memoryview], at: int, file_bytes: int, problems: Problems) -> Iterator[Record]:
    """Yield the kernel's records in the stream that *parts* are.

    *at*: byte in the file for problems. *file_bytes*: the file's size, of which at most `_LARGEST` times is unpacked.
    """
    rest = b""
    total = 0
    for chunk in _chunks(parts, at, problems):
        total += len(chunk)
        if total > _LARGEST * file_bytes:
            problems.add(at, f"compressed records are more than {_LARGEST} times the file: the rest is not read")
            return
        rest += chunk
        view, place = memoryview(rest), 0
        while place + HEADER.size <= len(rest):
            kind, misc, size = HEADER.unpack_from(rest, place)
            if size < HEADER.size or not known_type(kind):
                problems.add(at, f"compressed records end in a record of type {kind} and {size} bytes: there is none")
                return
            if place + size > len(rest):
                break
            if kind < FIRST_USER_TYPE:
                yield Record(at, kind, misc, view[place + HEADER.size : place + size], view[:0])
            place += size
        rest = rest[place:]
    if rest:
        problems.add(at, f"the last of the compressed records is cut: {len(rest)} bytes are left")


def _chunks(parts: list[memoryview], at: int, problems: Problems) -> Iterator[bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(b"".join([*parts, _END_OF_FRAME])), "zstd")
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except OSError as error:  # damaged
            problems.add(at, f"compressed records cannot be unpacked to their end: {error}")
            return
        if not chunk:
            return
        yield chunk
