"""SPE records to bytes and back: every packet of the architecture (Arm ARM DDI 0487 M.a.a chapter D18; spe.md 4).

    records, report = decode(buffer)
    buffer = encode(records, report.extra)

`decode(encode(records))` gives the same records. A stream from hardware may be damaged: cut by a fault in the middle of
a record, glued together by the padding that a driver put there, or simply wrong. `decode` never fails and never
guesses: it returns complete records only, and reports where everything else lies. Where it is stricter than perf 6.1:

* perf merges a cut record with the next one, so that a store may show the address of a dead load (spe.md 4.7). Here a
  packet that comes twice ends the first of the two records, and so does a record longer than `max_size`.
* perf makes a sample of what precedes a bad byte. Here it is damage.
* perf takes 0x20 to 0x23 before 0x00 for alignment, which the architecture does not have. Here it is an unknown packet.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import PacketError
from spepolicy.spe.decoding import MAX_SIZE, STATE, STATE_FIELDS, decode_into
from spepolicy.spe.encoding import WRONG, encode_into, measure
from spepolicy.spe.headers import KIND_OF, PRESENT_OF, SIZE_OF
from spepolicy.spe.records import EXTRA, RECORD, Present
from spepolicy.spe.report import DAMAGE, DamageKind, DecodeReport

__all__ = ["DAMAGE", "EXTRA", "RECORD", "DamageKind", "DecodeReport", "decode", "encode"]

_BLOCK = 8192  # records that are encoded at a time
_COMMON_RECORD = (
    40  # bytes, fewer than most have (spe.md 4.6): a first guess that need not grow, as untouched memory costs nothing
)


def decode(
    buffer: Any,
    *,
    max_size: int = MAX_SIZE,
    align: int = 1,
    unknown: Literal["skip", "byte"] = "skip",
) -> tuple[NDArray[Any], DecodeReport]:
    """Decode a stream of SPE packets.

    Memory beside the buffer follows from what is found: 104 bytes for a record, which has 3 bytes at least and mostly
    30 to 64; 24 bytes for a damaged place; nothing for padding. A stream of hundreds of MB is best decoded in pieces,
    each from `report.rest` of the one before on: to find memory for all records at once may cost more than to decode.

    :param buffer: bytes, or anything with the buffer interface.
    :param max_size: bytes, 1 to 2048: no record is longer. 2**PMSIDR_EL1.MaxSize, if known, finds more cut records.
    :param align: bytes: a record begins at a multiple of it, perhaps with padding, and takes *max_size* from there at
        most: 2**PMBIDR_EL1.Align, if known. With both 64 each record is looked for in a place of its own.
    :param unknown: what to do at a header that the architecture does not define. `skip` goes on behind the packet, by
        the size in the header, as the architecture asks of software (spe.md 4.1): right for streams of later
        versions. `byte` goes on with the next byte, as perf does: it finds back sooner into a stream that has been
        overwritten.
    :returns: `RECORD`[records] in the order of the stream, and the report.
    :raises ValueError: if *max_size* or *align* is out of range.
    """
    if not 1 <= max_size <= MAX_SIZE or align < 1:
        raise ValueError(f"max_size={max_size}, align={align}: must be 1 to {MAX_SIZE}, and 1 or more.")
    stream = np.frombuffer(buffer, np.uint8)
    count = len(stream)
    # Eight bytes from every offset on; numpy and numba know that such a view is not aligned.
    words: NDArray[Any] = np.ndarray(max(count - 7, 0), "<u8", stream if count else b"", 0, (1,))
    tables = [np.empty(count // _COMMON_RECORD + 1, RECORD)]
    tables += [np.empty(max_size + 2, dtype) for dtype in (EXTRA, DAMAGE)]
    state = np.zeros(len(STATE_FIELDS), np.int64)
    while True:
        records, extra, damage = tables
        rows = records.view(np.uint64).reshape(-1, RECORD.itemsize // 8)
        by_byte = unknown == "byte"
        done = decode_into(
            stream, words, records, extra, damage, state, KIND_OF, SIZE_OF, PRESENT_OF, rows, max_size, align, by_byte
        )
        del records, extra, damage, rows
        filled = [int(state[STATE[name]]) for name in ("records", "extra", "damage")]
        if done:
            break
        part = max(int(state[STATE["position"]]), 1) / count
        for table, used, spare in zip(tables, filled, (1, max_size + 2, max_size + 2), strict=True):
            _resize(table, max(len(table), min(int(used / part * 1.1), 2 * used) + spare))
    for table, used in zip(tables, filled, strict=True):
        _resize(table, used)
    records, extra, damage = tables
    report = DecodeReport(count, int(state[STATE["padding"]]), damage, extra, int(state[STATE["rest"]]))
    return records, report


def encode(
    records: NDArray[Any],
    extra: NDArray[Any] | None = None,
    *,
    layout: Literal["architecture", "neoverse"] = "architecture",
    align: int = 1,
) -> bytes:
    """Encode records as a stream of SPE packets.

    :param records: `RECORD`[N]. `offset` and `size` are ignored, and so are the fields of packets that are not present.
    :param extra: `EXTRA`[packets], sorted by record: further packets, written behind the addresses of their record.
    :param layout: `architecture` is the order of packets in Arm's pseudocode (spe.md rule 27), without gaps;
        `neoverse` is the record of 64 bytes in which each packet has a fixed place, and zeros are left if it is absent.
    :param align: bytes: each record is padded with zeros to a multiple of it, 2**PMBIDR_EL1.Align.
    :raises PacketError: with the index of the first record that no stream can hold, or that *layout* cannot.
    """
    if align < 1:
        raise ValueError(f"align={align}: must be 1 or more.")
    if extra is None:
        extra = np.empty(0, EXTRA)
    slots = layout == "neoverse"
    stream = io.BytesIO()
    scratch = np.empty(0, np.uint8)
    first_extra = np.searchsorted(extra["record_index"], np.arange(0, len(records) + 2 * _BLOCK, _BLOCK))
    if len(extra) and (
        extra["record_index"][-1] >= len(records) or (np.diff(extra["record_index"].astype(np.int64)) < 0).any()
    ):
        raise PacketError(
            f"{len(extra)} further packets are not sorted by record, or name one beyond {len(records)} records. "
            "Rule: 'record_index' rises, and is an index of 'records'."
        )
    # Block by block, so that a block is still in the cache when it is written after it was checked.
    for number, begin in enumerate(range(0, len(records), _BLOCK)):
        block = records[begin : begin + _BLOCK]
        more = extra[first_extra[number] : first_extra[number + 1]]
        at = stream.tell()
        size, index, what = measure(block, more, begin, SIZE_OF, KIND_OF, at, align, slots)
        if what:
            present = Present(int(records[index]["present"]))
            raise PacketError(
                f"record {index} of {len(records)} cannot be encoded: {WRONG[what]}. Its 'present' is {present!r}."
            )
        # A packet is written with eight bytes of payload whatever its size, so eight bytes behind the last must exist.
        if len(scratch) < size + 8:
            scratch = np.empty(size + 8, np.uint8)
        words: NDArray[Any] = np.ndarray(len(scratch) - 7, "<u8", scratch, 0, (1,))
        encode_into(scratch, words, block, more, begin, SIZE_OF, at, align, slots)
        stream.write(scratch[:size].data)
    return stream.getvalue()


def _resize(table: NDArray[Any], length: int) -> None:
    """Change the length of an array that nobody else refers to, in place if the memory behind it is free."""
    table.resize(length, refcheck=False)
