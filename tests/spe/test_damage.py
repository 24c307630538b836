"""Streams that are cut, glued together or wrong: what `decode` reports, what it never does, and what it may take."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spepolicy.spe.packets import DamageKind, DecodeReport, decode, encode
from spepolicy.spe.records import Present
from tests.spe.streams import END, EVENTS, LOAD, PA_PACKET, PC_A, PC_B, STAMP, packet, streams

BAD, UNKNOWN, NO_END, NO_EVENTS = (int(kind) for kind in DamageKind)


def places(report: DecodeReport) -> list[tuple[int, int, int, int]]:
    """Damaged places as (kind, offset, length, count)."""
    return [(int(p["kind"]), int(p["offset"]), int(p["length"]), int(p["count"])) for p in report.damage]


def test_a_cut_record_is_not_merged_with_the_next() -> None:
    """perf 6.1 gives the second record the PA of the first (spe.md 4.7); here the first is reported, and no more."""
    cut = PC_A + PA_PACKET + LOAD
    whole = PC_B + LOAD + EVENTS + STAMP
    (record,), report = decode(cut + bytes(7) + whole)
    assert record["pc"] == 0x40_0200
    assert not record["present"] & int(Present.PA)
    assert record["pa"] == 0
    assert (record["offset"], record["size"]) == (len(cut) + 7, len(whole))
    assert places(report) == [(NO_END, 0, len(cut), 1)]
    assert report.padding_bytes == 7


def test_a_known_record_size_finds_a_cut_record_that_shares_no_packet_with_the_next() -> None:
    cut = PC_A + PA_PACKET
    whole = LOAD + EVENTS + STAMP
    stream = cut + bytes(64 - len(cut)) + whole + bytes(64 - len(whole))
    assert decode(stream)[0]["pa"][0] != 0  # cannot be told apart without it
    (record,), report = decode(stream, max_size=64, align=64)
    assert (record["offset"], record["pa"], record["pc"]) == (64, 0, 0)
    assert places(report) == [(NO_END, 0, len(cut), 1)]


def test_no_record_is_longer_than_the_architecture_allows() -> None:
    """Padding within a record is skipped, but not without end."""
    records, report = decode(PC_A + bytes(2048) + EVENTS + STAMP)
    assert places(report) == [(NO_END, 0, 9, 1)]
    assert records["size"].tolist() == [12]
    assert len(decode(PC_A + bytes(2048 - 9 - 12) + EVENTS + STAMP)[0]) == 1


def test_a_stream_in_pieces_goes_on_where_a_record_was_cut() -> None:
    whole = PC_A + EVENTS + STAMP
    for cut in range(1, len(whole)):
        first = whole + whole[:cut]
        records, report = decode(first)
        assert records["offset"].tolist() == [0]
        assert report.rest == len(whole)
        assert places(report) == [(NO_END, len(whole), cut, 1)]
        records, report = decode(first[report.rest :] + whole[cut:])
        assert records["pc"].tolist() == [0x40_0100]
        assert report.rest == len(whole)
        assert report.clean


def test_the_rear_part_of_a_record_is_reported() -> None:
    whole = PC_A + LOAD + EVENTS + STAMP
    records, report = decode(STAMP + whole + END + END + whole)
    assert records["offset"].tolist() == [9, 9 + len(whole) + 2]
    assert places(report) == [(NO_EVENTS, 0, 9, 1), (NO_EVENTS, 9 + len(whole), 2, 2)]


def test_an_unknown_packet_is_skipped_by_its_size_and_kept() -> None:
    """Software must skip what it does not know by the size in the header (spe.md 4.1): the packets behind it count."""
    later = packet(0xE5, 0x0101_0101)  # four bytes of payload that would be End packets
    (record,), report = decode(PC_A + later + EVENTS + STAMP)
    assert record["present"] & int(Present.EXTRA | Present.PC) == int(Present.EXTRA | Present.PC)
    assert places(report) == [(UNKNOWN, 9, 5, 1)]
    assert [(int(e["header"]), int(e["value"])) for e in report.extra] == [(0xE5, 0x0101_0101)]
    assert encode(np.array([record]), report.extra) == PC_A + later + EVENTS + STAMP


def test_byte_by_byte_finds_back_behind_garbage_as_perf_does() -> None:
    """perf 6.1 prints sixteen `Bad packet!` for this stream, and the record behind them (perfdata.md 2)."""
    whole = PC_A + LOAD + EVENTS + STAMP
    records, report = decode(whole + b"\xff" * 16 + whole, unknown="byte")
    assert records["offset"].tolist() == [0, len(whole) + 16]
    assert places(report) == [(BAD, len(whole), 16, 16)]
    # In the middle of a record: what precedes lacks its end, what follows the Events packet.
    records, report = decode(PC_A + EVENTS + b"\xff" + STAMP + whole, unknown="byte")
    assert records["offset"].tolist() == [9 + 3 + 1 + 9]
    assert places(report) == [(NO_END, 0, 12, 1), (BAD, 12, 1, 1), (NO_EVENTS, 13, 9, 1)]


def test_perf_alignment_is_no_packet() -> None:
    """`20 00` would be alignment to perf; the architecture has a two-byte header of unknown kind and one byte."""
    _, report = decode(EVENTS + b"\x20\x00\x00" + STAMP)
    assert places(report) == [(UNKNOWN, 3, 3, 1)]


def test_a_report_says_where() -> None:
    text = str(decode(STAMP + PC_A)[1])
    assert text == "18 bytes: 1 no end (first at byte 9), 1 no events (first at byte 0)"
    assert str(decode(EVENTS + END)[1]) == "4 bytes, no damage"


def balance(stream: bytes, records: NDArray[Any], report: DecodeReport) -> None:
    """Every byte is in one record, in padding, or in one damaged place; and records stand apart, in order."""
    damage = report.damage[report.damage["kind"] != UNKNOWN]
    assert records["size"].sum() + report.padding_bytes + damage["length"].sum() == len(stream)
    starts = np.concatenate([records["offset"], damage["offset"]]).astype(np.int64)
    order = np.argsort(starts)
    ends = starts + np.concatenate([records["size"], damage["length"]]).astype(np.int64)
    assert (ends[order][:-1] <= starts[order][1:]).all()
    assert (records["present"] & int(Present.EVENTS) != 0).all()
    assert len(report.extra) == 0 or report.extra["record_index"].max() < len(records)
    has_extra = np.flatnonzero(records["present"] & int(Present.EXTRA))
    assert np.unique(report.extra["record_index"]).tolist() == has_extra.tolist()
    # What was found can be written, and is found again.
    again, second = decode(encode(records, report.extra))
    for name in records.dtype.names or ():
        if name not in ("offset", "size"):
            assert (again[name] == records[name]).all()
    assert second.extra.tobytes() == report.extra.tobytes()


HEADERS = st.sampled_from([0, 0, 0, 1, 0x20, 0x21, 0x42, 0x43, 0x49, 0x52, 0x64, 0x71, 0x98, 0x9B, 0xB0, 0xB2, 0xB7])
NOISE = st.one_of(st.binary(max_size=400), st.lists(st.one_of(HEADERS, st.integers(0, 255)), max_size=400).map(bytes))


@settings(max_examples=600, deadline=None)
@given(NOISE, st.sampled_from(["skip", "byte"]), st.sampled_from([(2048, 1), (64, 64), (64, 4), (1, 1), (512, 16)]))
def test_any_bytes(stream: bytes, unknown: Any, limits: tuple[int, int]) -> None:
    records, report = decode(stream, unknown=unknown, max_size=limits[0], align=limits[1])
    balance(stream, records, report)


CHANGES = st.tuples(st.integers(0, 2**16), st.integers(0, 3), st.binary(max_size=12))


@settings(max_examples=400, deadline=None)
@given(streams(), st.lists(CHANGES, max_size=4), st.data())
def test_mutated_streams(
    drawn: tuple[NDArray[Any], NDArray[Any]], changes: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    """Bytes overwritten, put in, cut out: all that was not touched is found, once the decoder has found back."""
    stream = encode(*drawn, align=data.draw(st.sampled_from([1, 8, 64])))
    for where, cut, put in changes:
        at = where % (len(stream) + 1)
        stream = stream[:at] + put + stream[at + cut :]
    for unknown in ("skip", "byte"):
        records, report = decode(stream, unknown=unknown)  # type: ignore[arg-type]
        balance(stream, records, report)


def test_a_long_mutated_stream_keeps_nearly_all_records() -> None:
    """4,000 records of 64 bytes, every twentieth with a byte overwritten: the others come through, but for a few that a
    wrong size swallows."""
    rng = np.random.default_rng(5)
    one, _ = decode(PC_A + packet(0x99, 7) + PA_PACKET + LOAD + EVENTS + STAMP)
    records = np.repeat(one, 4000)
    records["timestamp"] = 10**9 + np.arange(4000)
    stream = np.frombuffer(encode(records, layout="neoverse"), np.uint8).copy()
    hit = np.arange(0, 4000, 20)
    stream[hit * 64 + rng.integers(0, 64, len(hit))] = rng.integers(0, 256, len(hit))
    for unknown in ("skip", "byte"):
        found, report = decode(stream, unknown=unknown, max_size=64, align=64)  # type: ignore[arg-type]
        untouched = np.setdiff1d(records["timestamp"], records["timestamp"][hit])
        missing = np.setdiff1d(untouched, found["timestamp"])
        assert len(missing) <= len(hit) // 10
        balance(stream.tobytes(), found, report)


@pytest.mark.parametrize("unknown", ["skip", "byte"])
def test_memory_is_a_small_multiple_of_the_input(unknown: Any) -> None:
    """Noise and good streams take about what their records take; the worst stream is one of nothing but the smallest
    records, 104 bytes for each 3."""
    size = 1 << 20
    rng = np.random.default_rng(3)
    small = b"\x42\x02\x01" * (size // 3)
    real = encode(np.repeat(decode(PC_A + LOAD + EVENTS + STAMP)[0], size // 64), layout="neoverse")
    cases = {
        "noise": (rng.bytes(size), 8),
        "real": (real, 2),
        "zeros": (bytes(size), 2),
        "ends": (b"\x01" * size, 2),
        "bad": (b"\x02" * size, 2),
        "bad and zero": (b"\x02\x00" * (size // 2), 24),
        "cut": (b"\x42\x00" * (size // 2), 24),
        "unknown": ((b"\xf0" + bytes(8)) * (size // 9), 8),
        "smallest": (small, 56),
    }
    decode(small[:3000])  # compiled before it is measured
    for name, (stream, factor) in cases.items():
        tracemalloc.start()
        try:
            decode(stream, unknown=unknown)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < factor * size + (1 << 20), name
