"""Recordings in guests of other sizes: every page lands where it is said to, and what does not is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spepolicy.errors import RecordingError
from spepolicy.machine.hostops import HostOp
from spepolicy.recording import NO_NOTIFIER, Recording, open_recording
from spepolicy.recording.placement import OUTSIDE, PLACEMENTS, place

RANGES = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 100)), min_size=1, max_size=12)


def recording(ranges: list[tuple[int, int]]) -> Recording:
    n = len(ranges)
    first = np.array([first for first, _ in ranges], np.int32)
    end = np.minimum(first + np.array([length for _, length in ranges]), 100).astype(np.int32)
    return Recording(
        time_us=np.arange(n, dtype=np.int64), first_page=first, end_page=end, op=np.full(n, HostOp.AGE, np.uint8),
        notifier=np.full(n, NO_NOTIFIER, np.uint8), write=np.zeros(n, np.bool_), ram_pages=100, duration_us=n,
        scenario="by hand", kernel="", source="by hand",
    )  # fmt: skip


def pages(of: Recording) -> list[tuple[int, int]]:
    """(time, page) of every page of every event, sorted."""
    rows = zip(of.time_us.tolist(), of.first_page.tolist(), of.end_page.tolist(), strict=True)
    return sorted((time, page) for time, first, end in rows for page in range(first, end))


@given(ranges=RANGES, ram=st.integers(1, 300), offset=st.integers(0, 150))
def test_same_moves_and_clips(ranges: list[tuple[int, int]], ram: int, offset: int) -> None:
    before = recording(ranges)
    after = place(before, ram, "same", offset)
    assert pages(after) == [(time, page + offset) for time, page in pages(before) if page + offset < ram]
    assert len(after) + after.ignored.get(OUTSIDE, 0) == len(before)


@given(ranges=RANGES, ram=st.integers(1, 300), offset=st.integers(0, 150))
def test_fold_keeps_everything_modulo_the_size(ranges: list[tuple[int, int]], ram: int, offset: int) -> None:
    before = recording(ranges)
    after = place(before, ram, "fold", offset)
    assert set(pages(after)) == {(time, (page + offset) % ram) for time, page in pages(before)}
    assert len(pages(after)) == len(set(pages(after)))
    assert (np.diff(after.time_us) >= 0).all()
    assert OUTSIDE not in after.ignored


@given(ranges=RANGES, ram=st.integers(1, 1000))
def test_scale_keeps_order_and_share(ranges: list[tuple[int, int]], ram: int) -> None:
    before = recording(ranges)
    after = place(before, ram, "scale")
    assert np.array_equal(after.time_us, before.time_us)
    assert (np.abs(after.first_page / ram - before.first_page / 100) <= 1 / ram).all()
    share = (after.end_page - after.first_page) / ram - (before.end_page - before.first_page) / 100
    assert (np.abs(share) <= 1 / ram).all()


def test_all_of_memory_stays_all_of_memory() -> None:
    scans = open_recording("numa_pinned")
    for ram in (4096, 65536, 1 << 20):
        scaled = place(scans, ram, "scale")
        unmaps = scaled.unmaps
        assert int((scaled.end_page[unmaps] - scaled.first_page[unmaps]).sum()) == ram


def test_the_same_place_in_the_same_memory_is_the_recording() -> None:
    before = open_recording("compact")
    for placement in PLACEMENTS:
        assert pages(place(before, before.ram_pages, placement)) == pages(before)


def test_an_unknown_placement() -> None:
    with pytest.raises(RecordingError, match="'near' is not one of same, scale, fold"):
        place(open_recording("compact"), 100, "near")
