"""The container: tables of the format, round trips of records, trailers and clocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spepolicy.perfdata.clock import conversion, ns_to_ticks, ticks_to_ns
from spepolicy.perfdata.container import open_container
from spepolicy.perfdata.layout import (
    LAYOUTS,
    AuxtraceError,
    AuxtraceInfo,
    Comm,
    Mmap,
    Mmap2,
    SampleId,
    SampleType,
    TimeConv,
    Type,
    pack_body,
    pack_sample_id,
    parse_body,
    parse_sample_id,
    sample_id_bytes,
)
from tests.perfdata.streams import two_sessions

SIGNED, UNSIGNED = st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**64 - 1)
NAME = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)
ODD = {"H": 16, "I": 32, "Q": 64, "B": 8}


def bodies(kind: Type) -> st.SearchStrategy[tuple[object, ...]]:
    """Values for every field of a record, by the format of its layout."""
    layout = LAYOUTS[kind]
    if kind is Type.AUXTRACE_ERROR:
        ascii_message = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=63)
        return st.tuples(*[st.integers(0, 2**31 - 1)] * 6, UNSIGNED, UNSIGNED, ascii_message, *[st.integers(0, 99)] * 2)
    fields: list[st.SearchStrategy[object]] = []
    for code in layout.format.format.lstrip("<").replace("6x", "").replace("24s", "s"):
        if code == "i":
            fields.append(SIGNED)
        elif code == "s":
            fields.append(st.binary(min_size=24, max_size=24))
        else:
            fields.append(st.integers(0, 2 ** ODD[code] - 1))
    if layout.tail:
        fields.append(NAME if layout.tail == "text" else st.lists(UNSIGNED, max_size=9).map(tuple))
    return st.tuples(*fields)


@given(st.sampled_from(sorted(LAYOUTS)).flatmap(lambda kind: st.tuples(st.just(kind), bodies(kind))))
def test_every_record_is_read_as_it_was_written(case: tuple[Type, tuple[object, ...]]) -> None:
    kind, values = case
    body = LAYOUTS[kind].body(*values)
    raw = pack_body(kind, body)
    assert len(raw) % 8 == 0
    assert parse_body(kind, memoryview(raw)) == body


def test_bytes_of_records_are_those_of_the_format() -> None:
    """Spelled out from perfdata.md 3, which was tested against perf 6.1 byte by byte."""
    assert pack_body(Type.COMM, Comm(7, 8, "ab")) == b"\7\0\0\0\x08\0\0\0" + b"ab\0\0\0\0\0\0"
    assert pack_body(Type.COMM, Comm(7, 8, "abcdefgh"))[8:] == b"abcdefgh" + bytes(8)
    assert pack_body(Type.MMAP, Mmap(-1, 0, 1, 2, 3, "k"))[:16] == b"\xff" * 4 + bytes(4) + b"\1" + bytes(7)
    assert len(pack_body(Type.MMAP2, Mmap2(1, 1, 0, 0, 0, bytes(24), 5, 2, "x"))) == 64 + 8
    assert pack_body(Type.AUXTRACE_INFO, AuxtraceInfo(4, 0, (8, 1))) == b"\4" + bytes(7) + b"\x08" + bytes(
        7
    ) + b"\1" + bytes(7)
    assert len(pack_body(Type.TIME_CONV, TimeConv(0, 1, 0))) == 48
    error = AuxtraceError(1, 5, 0, 1000, 1000, 2, 0, 253080, "stage2-fault 12.3us" + "x" * 99, 4242, 0)
    raw = pack_body(Type.AUXTRACE_ERROR, error)
    assert len(raw) == 112  # 120 with the header
    assert raw[40:59] == b"stage2-fault 12.3us"
    assert raw[103] == 0  # the message ends within its 64 bytes


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if LAYOUTS[kind].format.size > 8])
def test_a_body_that_is_too_short_says_so(kind: Type) -> None:
    with pytest.raises(ValueError, match="must have"):
        parse_body(kind, memoryview(bytes(7)))


def test_the_short_forms_of_older_kernels_are_read() -> None:
    clock = parse_body(Type.TIME_CONV, memoryview(pack_body(Type.TIME_CONV, TimeConv(24, 40, 9)))[:24])
    assert clock == TimeConv(24, 40, 9, cap_short=0)
    error = AuxtraceError(1, 5, 0, 1, 2, 1, 3, 4, "lost", 0, 0)
    assert parse_body(Type.AUXTRACE_ERROR, memoryview(pack_body(Type.AUXTRACE_ERROR, error))[:104]) == error


TRAILER_BITS = (
    SampleType.TID,
    SampleType.TIME,
    SampleType.ID,
    SampleType.STREAM_ID,
    SampleType.CPU,
    SampleType.IDENTIFIER,
)


@given(st.sets(st.sampled_from(TRAILER_BITS)), SIGNED, SIGNED, st.integers(0, 2**63 - 1), SIGNED, st.integers(0, 2**63))
def test_a_trailer_is_read_as_it_was_written(
    bits: set[SampleType], pid: int, tid: int, time: int, cpu: int, number: int
) -> None:
    form = int(sum(bits)) | SampleType.IP | SampleType.ADDR  # bits that have no part in trailers
    raw = pack_sample_id(form, SampleId(pid, tid, time, cpu, number))
    assert len(raw) == sample_id_bytes(form) == 8 * len(bits)
    found = parse_sample_id(form, memoryview(b"body of 8 bytes" + raw))
    told = SampleId(
        *(pid, tid) if SampleType.TID in bits else (-1, -1),
        time if SampleType.TIME in bits else -1,
        cpu if SampleType.CPU in bits else -1,
        number if bits & {SampleType.ID, SampleType.IDENTIFIER} else -1,
    )
    assert found == told


# -- clocks ------------------------------------------------------------------------------------------------------------

TESTED = {
    25_000_000: (24, 671088640),
    1_000_000_000: (30, 1 << 30),
    54_000_000: (25, 621378370),
    100_000_000: (24, 167772160),
}


@pytest.mark.parametrize("frequency", TESTED)
@given(ticks=st.integers(0, 2**52))
def test_the_conversion_is_that_of_perf(frequency: int, ticks: int) -> None:
    """The formula of perfdata.md 3, verified there to the ns with these shifts and multipliers."""
    shift, multiplier = TESTED[frequency]
    expected = (ticks >> shift) * multiplier + ((ticks & ((1 << shift) - 1)) * multiplier >> shift)
    found = ticks_to_ns(TimeConv(shift, multiplier, 0), np.array([ticks], np.uint64))
    assert int(found[0]) == expected


@given(st.integers(1_000_000, 4_000_000_000), st.integers(0, 10**13))
def test_a_made_conversion_is_right_to_a_nanosecond_in_a_second(frequency: int, ns: int) -> None:
    clock = conversion(frequency)
    ticks = ns_to_ticks(clock, ns)
    at, before = ticks_to_ns(clock, np.array([ticks, max(ticks - 1, 0)], np.uint64)).tolist()
    assert at >= ns
    assert before < ns or ticks == 0
    exact = ticks * 10**9 / frequency
    assert abs(at - exact) <= 1 + exact * 1e-9


def test_a_clock_that_wraps_short_and_starts_below_zero() -> None:
    clock = TimeConv(0, 40, (1 << 64) - 4000, cycles=1 << 20, mask=(1 << 16) - 1, cap_short=1)
    ticks = np.array([(1 << 20) + 5, (1 << 40) + (1 << 20) + 5], np.uint64)  # bits above the mask are not the counter's
    assert ticks_to_ns(clock, ticks).tolist() == [((1 << 20) + 5) * 40 - 4000] * 2


# -- the file ----------------------------------------------------------------------------------------------------------


def test_records_are_walked_from_first_to_last() -> None:
    content = two_sessions()
    file = open_container(memoryview(content), "made")
    kinds = [Type(record.kind) for record in file.records()]
    session = [Type.AUX, Type.AUXTRACE, Type.FINISHED_ROUND]
    assert kinds == [Type.TIME_CONV, Type.AUXTRACE_INFO, Type.COMM, *session, *session, Type.FINISHED_ROUND]
    assert file.problems.count == 0
    assert [event.ids for event in file.events] == [(100,), (101,)]
    assert file.events[0].period == 4096
