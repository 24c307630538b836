"""The guest's SPE driver against its rules (SPE reference, section 3), which are written down here a second time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spepolicy.machine.scenario import Cpu, Guest, Scenario
from spepolicy.machine.state import NEVER

from .interpreted import Lane
from .spu_bench import one_kind

PAGE = 4096
OFF = "off"


@dataclass
class Ring:
    """An AUX ring by the rules of section 3.2, on unbounded integers. Positions are bytes since it was opened."""

    size: int
    head: int
    tail: int
    align: int
    largest: int

    def __post_init__(self) -> None:
        self.half = self.size // 2
        self.woken = self.head // self.half * self.half
        self.wakes = 0
        self.truncated = 0

    def begin(self) -> tuple[int, int] | str:
        """Open a handle. Return (start, end) of what the SPU may write as offsets, or OFF if the event is disabled."""
        self.room = self._room()
        if self.room == 0:
            return self._disable()
        self.wakeup = self.woken + self.half
        end = self._end()
        if end is not None and end - self.head % self.size < self.largest:
            self._pad(end - self.head % self.size)
            end = self._end()
        if end is None:
            self.truncated = 1  # an open handle is closed with the flag
            return self._disable()
        return self.head % self.size, end

    def _room(self) -> int:
        # One byte stays free, so that a full ring differs from an empty one.
        return 0 if self.head - self.tail >= self.size else self.size - 1 - (self.head - self.tail)

    def _pad(self, count: int) -> None:
        self.head += count
        self.room -= count
        if self.head - self.woken >= self.half:
            self.woken = self.head // self.half * self.half
            self.wakeup = self.woken + self.half
            self.wakes += 1

    def _end(self) -> int | None:
        if self.head % self.align:
            self._pad(min(self.align - self.head % self.align, self.room))
        if self.room == 0:
            return None
        start, stop = self.head % self.size, (self.head + self.room) % self.size
        end = stop // PAGE * PAGE if start < stop else self.size
        wakeup = self.wakeup % self.size
        if self.wakeup < self.head + self.room and start <= wakeup:
            end = min(end, -(-wakeup // PAGE) * PAGE)
        if end > start:
            return end
        self._pad(self.room)
        return None

    def _disable(self) -> str:
        self.wakes += 1
        return OFF


def driver(pages: int, align: int, largest: int, head: int = 0, tail: int = 0, **guest: int) -> Lane:
    """A vCPU on bare metal whose AUX ring has been written up to *head* and read up to *tail*."""
    lane = Lane(
        Scenario(
            workload=one_kind(),
            cpu=Cpu(max_record_bytes=largest, align_bytes=align),
            guest=Guest(**({"ram_pages": 256, "buffer_pages": pages} | guest)),
        ),
        virtualized=False,
    )
    lane.v.aux_head, lane.v.aux_tail = head, tail
    lane.v.aux_wakeup = head // (pages * PAGE // 2) * (pages * PAGE // 2)
    return lane


@st.composite
def rings(draw: st.DrawFn) -> Ring:
    """Rings in which anything may be behind and before the head; positions near page and buffer borders come often."""
    size = PAGE * draw(st.sampled_from([2, 4, 16]))
    largest = draw(st.sampled_from([64, 256, 2048]))
    align = draw(st.sampled_from([a for a in (1, 8, 64, 256) if a <= largest]))
    border = st.integers(0, 3 * size // PAGE).map(lambda n: n * PAGE)
    beside = st.one_of(st.sampled_from([0, -1, 1, -largest, -largest - 1, 1 - largest]), st.integers(-300, 300))
    near = st.tuples(border, beside).map(lambda t: max(sum(t), 0))
    head = draw(st.one_of(near, st.integers(0, 3 * size)))
    behind = draw(st.one_of(st.sampled_from([0, 1, size - 1, size]), st.integers(0, size)))
    return Ring(size, head, max(head - behind, 0), align, largest)


@given(ring=rings())
@example(ring=Ring(2 * PAGE, PAGE - 64, PAGE - 64, 64, 64))  # room for exactly one record
@settings(deadline=None, max_examples=300)
def test_the_driver_programs_what_the_rules_say(ring: Ring) -> None:
    """Limit, padding, wakeup, truncation, and who is woken: for any head, tail and alignment."""
    lane = driver(ring.size // PAGE, ring.align, ring.largest, ring.head, ring.tail)
    lane.call("linux_spe.output_begin", 0)
    v = lane.v
    expected = ring.begin()
    assert v.aux_head == ring.head
    assert v.aux_wakeup == ring.woken
    assert (v.reader_ps != NEVER) == (ring.wakes > 0)
    assert v.event_active == int(expected != OFF)
    assert v.handle_open == int(expected != OFF)
    assert lane.tr.truncated == ring.truncated
    if expected == OFF:
        assert v.pmblimitr & 1 == 0
        assert lane.tr.ring_full == 1
    else:
        start, end = expected
        assert (v.pmbptr - v.buffer_va, (v.pmblimitr & ~0xFFF) - v.buffer_va) == (start, end)
        assert v.pmblimitr & 1 == 1


@given(ring=rings())
@settings(deadline=None)
def test_what_the_driver_programs_is_legal(ring: Ring) -> None:
    """SPE rule 34, and no byte that perf has not read yet may be written again."""
    lane = driver(ring.size // PAGE, ring.align, ring.largest, ring.head, ring.tail)
    lane.call("linux_spe.output_begin", 0)
    v = lane.v
    if not v.pmblimitr & 1:
        return
    pointer, limit = int(v.pmbptr), int(v.pmblimitr) & ~0xFFF
    assert pointer <= limit - ring.largest
    assert pointer % ring.align == 0
    assert limit <= v.buffer_va + ring.size
    assert int(v.aux_head) + limit - pointer <= ring.tail + ring.size - 1
    assert v.aux_head >= ring.head


@given(pages=st.sampled_from([2, 4, 16]), written=st.lists(st.integers(0, 300), min_size=1, max_size=30))
@settings(deadline=None)
def test_sessions_one_after_the_other_never_lose_their_place(pages: int, written: list[int]) -> None:
    """Whatever each session writes, the next begins where it ended, and perf is woken at every half of the ring."""
    lane = driver(pages, 64, 64)
    v = lane.v
    for count in written:
        lane.call("linux_spe.output_begin", 0)
        if v.pmblimitr & 1 == 0:
            lane.call("linux_spe.read_ring", 0)
            assert v.aux_tail == v.aux_head
            continue
        room = ((int(v.pmblimitr) & ~0xFFF) - int(v.pmbptr)) // 64
        head = int(v.aux_head)
        v.pmbptr += 64 * min(count, room)
        v.pmblimitr &= ~1
        woken = int(v.aux_wakeup)
        lane.call("linux_spe.output_end", 0, int(v.pmbptr - v.buffer_va) - head % (pages * PAGE))
        assert v.aux_head == head + 64 * min(count, room)
        half = pages * PAGE // 2
        assert v.aux_wakeup == (int(v.aux_head) // half * half if int(v.aux_head) - woken >= half else woken)
        assert v.handle_open == 0


# ---- interrupt handler -----------------------------------------------------------------------------------------------

OK_FULL = (0x00, 1)
EVENTS = [OK_FULL, (0x00, 0), (0x00, 4), (0x24, 0x07), (0x24, 0x0F), (0x25, 0x07), (0x1E, 0), (0x1F, 0), (0x2A, 3)]


@pytest.mark.parametrize("dl", [0, 1])
@pytest.mark.parametrize("coll", [0, 1])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"EC={event[0]:#x},MSS={event[1]:#x}")
@pytest.mark.parametrize("align", [64, 4])
def test_the_handler_does_what_the_table_says(event: tuple[int, int], dl: int, coll: int, align: int) -> None:
    """Section 3.4: EC=0 BSC=1 goes on, everything else switches SPE off; DL truncates whatever the event was."""
    lane = driver(4, align, 64)
    v, tr = lane.v, lane.tr
    lane.call("linux_spe.output_begin", 0)
    v.pmscr = 3
    v.pmbptr += 10 * 64
    tr.written = tr.pending = 10
    lane.m.unseen[0, 0, 0] = 10
    ec, mss = event
    v.pmbsr = ec << 26 | dl << 19 | 1 << 17 | coll << 16 | mss
    enabled = lane.call("linux_spe.handle_interrupt", 0)

    fatal = event != OK_FULL
    off = fatal or bool(dl)
    assert bool(enabled) == (not off)
    assert (v.pmblimitr & 1) == int(not off)
    assert v.pmscr == (0 if off else 3)
    assert v.pmbsr == 0
    assert v.virq == 0
    assert v.handle_open == int(not off)
    assert v.aux_head == 640, "the size handed over is PMBPTR minus head"
    assert (tr.fatal, tr.silent_fatal) == (int(fatal), int(fatal and not dl))
    assert tr.truncated == dl
    assert v.event_active == 1 - dl
    # perf is told of truncation, and only then; a fatal event without DL leaves it waiting for data that never comes.
    assert (v.reader_ps != NEVER) == bool(dl)
    thrown_away = dl and align != 64
    assert (tr.kept, tr.discarded) == ((0, 10) if thrown_away else (10, 0))
    assert lane.m.seen[0, 0, 0] == tr.kept
    assert tr.spurious == 0


@pytest.mark.parametrize("coll", [0, 1])
def test_the_handler_finds_nothing_without_s(coll: int) -> None:
    lane = driver(4, 64, 64)
    lane.call("linux_spe.output_begin", 0)
    lane.v.pmbsr = coll << 16
    before = lane.v.record.copy()
    enabled = lane.call("linux_spe.handle_interrupt", 0)
    assert not enabled
    assert lane.tr.spurious == 1
    assert lane.v.record == before


def test_records_of_a_truncated_session_stay_where_they_end() -> None:
    """Fixed-size records: DL costs the event, not the records before it, for the last whole one can be found."""
    kept = {}
    for align in (64, 16):
        lane = driver(4, align, 64)
        lane.call("linux_spe.output_begin", 0)
        lane.tr.written = lane.tr.pending = 5
        lane.m.unseen[0, 0, 0] = 5
        lane.v.pmbptr += 5 * 64
        lane.v.pmbsr = 1 << 19 | 1 << 17 | 1
        lane.call("linux_spe.handle_interrupt", 0)
        kept[align] = int(lane.tr.kept), int(lane.tr.discarded), int(lane.tr.pending)
    assert kept == {64: (5, 0, 0), 16: (0, 5, 0)}


# ---- start and stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "events", "latency", "jitter"), list(itertools.product([0, 1, 6], [0, 0b100], [0, 20], [False, True]))
)
def test_rule_21_the_driver_never_programs_an_unpredictable_filter(
    types: int, events: int, latency: int, jitter: bool
) -> None:
    """FT, FE and FL are set exactly where their register holds something (section 3.1); RND is the jitter option."""
    lane = driver(
        4, 64, 64, type_filter=types, event_filter=events, min_latency_cycles=latency, jitter=jitter, period_ops=768
    )
    lane.call("linux_spe.start_sampling", 0)
    v = lane.v
    assert v.pmsfcr & 0b111 == (events != 0) | (types != 0) << 1 | (latency != 0) << 2
    assert (v.pmsfcr >> 16) & 7 == types
    assert (v.pmsevfr, v.pmslatfr) == (events, latency)
    assert v.pmsirr == 768 | jitter
    assert v.pmscr == 1 << 5 | 3  # TS, E1SPE, E0SPE


def test_stop_hands_over_what_was_written_and_keeps_the_interval() -> None:
    """arm_spe_pmu_stop: sampling off, drain, buffer off, close the handle; PMSICR goes on at the next start."""
    lane = driver(4, 64, 64)
    v, tr = lane.v, lane.tr
    lane.call("linux_spe.output_begin", 0)
    lane.call("linux_spe.start_sampling", 0)
    v.left_ops = 77
    v.flight, v.tlb_page = 1, -1
    lane.call("linux_spe.stop_sampling", 0)
    assert (v.pmscr, v.flight, tr.written) == (0, 0, 1), "the record in flight is drained, not lost"
    lane.call("linux_spe.stop_buffer", 0)
    assert (v.pmblimitr & 1, v.handle_open) == (0, 0)
    assert (v.aux_head, tr.kept, v.left_ops) == (64, 1, 77)


@pytest.mark.parametrize(("event", "dl", "active"), [(OK_FULL, 0, 1), ((0x25, 7), 0, 1), ((0x25, 7), 1, 0)])
def test_stop_meets_an_event_that_nobody_has_handled(event: tuple[int, int], dl: int, active: int) -> None:
    """Section 3.5: a real event is evaluated and cleared; only DL disables the event."""
    lane = driver(4, 4, 64)
    lane.call("linux_spe.output_begin", 0)
    lane.v.pmbsr = event[0] << 26 | dl << 19 | 1 << 17 | event[1]
    lane.call("linux_spe.stop_buffer", 0)
    assert (lane.v.pmbsr, lane.v.handle_open, lane.v.event_active) == (0, 0, active)


# ---- perf's reader ---------------------------------------------------------------------------------------------------


def test_the_reader_takes_its_latency_and_the_time_to_copy() -> None:
    lane = driver(16, 64, 64, head=5 * PAGE, tail=PAGE, reader_latency_ps=1_000_000, reader_bytes_per_us=1000)
    lane.v.now_ps = 10
    lane.call("linux_spe.output_end", 0, 4 * PAGE)  # passes the middle of the ring
    per_kib = int(lane.par.reader_ps_per_kib)
    assert lane.v.reader_ps == 10 + 1_000_000 + 8 * 4 * per_kib
    assert abs(per_kib - 1024 * 1_000_000 // 1000) < 1000


def test_a_disabled_event_starts_again_when_perf_has_read() -> None:
    lane = driver(4, 64, 64, head=4 * PAGE - 1)
    lane.call("linux_spe.output_begin", 0)
    assert (lane.v.event_active, lane.v.pmblimitr & 1) == (0, 0)
    lane.call("linux_spe.read_ring", 0)
    assert (lane.v.event_active, lane.v.restart) == (1, 1)
    assert lane.v.aux_tail == lane.v.aux_head


def test_a_new_session_has_other_pages_behind_the_same_addresses() -> None:
    lane = driver(4, 64, 64, head=100 * 64, tail=0)
    before = [lane.buffer_page(n) for n in range(4)]
    lane.m.tlb[0, 0, 0] = (lane.v.buffer_va >> 12, 1, 2, 0)
    lane.v.tlb_page = lane.v.buffer_va >> 12
    lane.call("linux_spe.renew_buffer", 0)
    after = [lane.buffer_page(n) for n in range(4)]
    assert not set(before) & set(after)
    assert len(set(after)) == 4
    assert (lane.v.aux_head, lane.v.aux_tail, lane.v.aux_wakeup) == (0, 0, 0)
    assert lane.v.tlb_page == -1
    assert np.all(lane.m.tlb[0, 0, :, 0] == -1)
