"""The SPU's rules, by their numbers in section 2 of the SPE reference, one SPU at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.arch.registers import EC_STAGE1, EC_STAGE2
from spepolicy.machine.scenario import Cpu
from spepolicy.machine.state import NEVER, LostCause
from spepolicy.machine.trace import LogKind

from .interpreted import module
from .spu_bench import FIXED, OP_PS, PAGE, Bench, one_kind

INVALID = ~1
NO_ACCESS_FLAG = ~(1 << 10)
LOAD = 2

intervals = st.integers(1, 16).map(lambda n: 256 * n)


def selections(bench: Bench, count: int) -> list[int]:
    """Return the times of the next *count* selections, in ps."""
    times = []
    bench.run(int(bench.v.now_ps))
    for _ in range(count):
        times.append(int(bench.v.select_ps))
        before = int(bench.tr.selected)
        bench.run(times[-1])
        assert bench.tr.selected == before + 1
    return times


# ---- enable and stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "user", "kernel", "enable", "stopped"), list(itertools.product([0, 1], repeat=5)))
def test_rule_4_profiling_is_enabled_by_the_bit_of_the_current_level(
    level: int, user: int, kernel: int, enable: int, stopped: int
) -> None:
    bench = Bench()
    v = bench.v
    v.level, v.pmscr, v.pmbsr = level, user | kernel << 1, stopped << 17
    v.pmblimitr = bench.limit | enable
    selected = kernel if level else user
    assert module("machine.spu").profiling_enabled(v) == bool(enable and not stopped and selected)


def test_rule_7_a_sample_of_a_stopped_or_disabled_buffer_is_discarded() -> None:
    for disable in (lambda v: setattr(v, "pmblimitr", v.pmblimitr & ~1), lambda v: setattr(v, "pmbsr", 1 << 17)):
        bench = Bench(workload=one_kind(latency=1000))
        selections(bench, 1)
        pointer, counter = int(bench.v.pmbptr), int(bench.v.left_ops)
        disable(bench.v)
        bench.call("spu.drain", 0)
        assert sum(bench.lost().values()) == 1
        assert bench.tr.written == 0
        assert (bench.v.pmbptr, bench.v.left_ops) == (pointer, counter)


# ---- interval counter ------------------------------------------------------------------------------------------------


@given(interval=intervals, samples=st.integers(0, 8))
@settings(deadline=None)
def test_rule_10_without_jitter_the_period_is_exactly_the_interval_plus_one(interval: int, samples: int) -> None:
    """The member that finds COUNT=0 reloads it and is not counted down; the first finds it after INTERVAL members."""
    last = interval * OP_PS + samples * (interval + 1) * OP_PS
    assert Bench(interval=interval).run(last) == last
    for end, selected in ((last - 1, samples), (last, samples + 1), (last + 1, samples + 1)):
        bench = Bench(interval=interval)
        bench.run(end)
        assert bench.tr.selected == selected
        assert bench.tr.collided == 0


def test_rule_11_jitter_adds_a_random_low_byte_to_every_interval() -> None:
    bench = Bench(interval=512, jitter=True, buffer_pages=64)
    gaps = np.diff(selections(bench, 3000)) // OP_PS - 1  # the reloading member itself
    assert gaps.min() >= 512
    assert gaps.max() <= 512 + 255
    assert len(set(gaps.tolist())) == 256
    # The mean of 3000 uniform bytes has a standard deviation of 1.35.
    assert abs(gaps.mean() - (512 + 127.5)) < 6


@given(
    interval=intervals,
    pauses=st.lists(st.tuples(st.integers(1, 700), st.integers(0, 10**6)), min_size=1, max_size=12),
)
@settings(deadline=None)
def test_rule_13_the_counter_holds_while_profiling_is_disabled(interval: int, pauses: list[tuple[int, int]]) -> None:
    """However profiling is cut into pieces, a selection comes after the same number of profiled operations."""
    bench, whole = Bench(interval=interval), Bench(interval=interval)
    spu = module("machine.spu")
    profiled = 0
    for ops, pause_ps in pauses:
        bench.run(int(bench.v.now_ps) + ops * OP_PS)
        profiled += ops
        spu.hold_counter(bench.v, bench.v.now_ps)
        bench.v.now_ps += pause_ps
    whole.run(profiled * OP_PS)
    # A pause at the very operation that is due for selection may come before or after it.
    due = profiled >= interval and (profiled - interval) % (interval + 1) == 0
    assert int(whole.tr.selected) - int(bench.tr.selected) in ((0, 1) if due else (0,))


@given(paused_at_ps=st.integers(0, 512 * OP_PS))
@settings(deadline=None)
def test_rule_13_an_operation_that_was_cut_counts_when_it_is_executed(paused_at_ps: int) -> None:
    """Profiling ends in the middle of an operation: that one is still to come, so nothing is selected too early."""
    bench = Bench(interval=512)
    bench.run(paused_at_ps)
    module("machine.spu").hold_counter(bench.v, paused_at_ps)
    if bench.tr.selected == 0:
        assert bench.v.left_ops == max(-(-(512 * OP_PS - paused_at_ps) // OP_PS), 1)


def test_rule_13_what_is_left_is_a_number_of_operations_whatever_they_take() -> None:
    bench = Bench(interval=512)
    bench.run(100 * OP_PS)
    bench.call("spu.run_counter", 0, 7 * OP_PS)  # EL1 operations take longer
    assert bench.v.select_ps - bench.v.now_ps == 412 * 7 * OP_PS


# ---- collisions ------------------------------------------------------------------------------------------------------


@given(interval=intervals, latency=st.one_of(st.integers(1, 4000), st.integers(0, 3).map(lambda n: 257 * n + 257)))
@settings(deadline=None)
def test_rule_14_a_selection_while_one_is_in_flight_is_dropped(interval: int, latency: int) -> None:
    """The new operation is dropped, the one in flight goes on; COLL is set, S is not, and no interrupt is raised."""
    cpu = Cpu(max_record_bytes=64, align_bytes=64, cycle_ps=OP_PS)
    bench = Bench(cpu=cpu, interval=interval, workload=one_kind(latency=latency), buffer_pages=16)
    period_ps, busy_ps = (interval + 1) * OP_PS, latency * OP_PS
    samples = 40
    bench.run(interval * OP_PS + samples * period_ps - 1)
    every = max(-(-busy_ps // period_ps), 1)  # a sample that completes at a selection makes room for it
    accepted = -(-samples // every)
    assert bench.tr.selected == samples
    assert bench.tr.collided == samples - accepted
    assert bench.syndrome["COLL"] == int(samples > accepted)
    assert bench.syndrome["S"] == 0
    assert bench.v.irq_ps == NEVER
    assert bench.tr.written + int(bench.v.flight) == accepted


# ---- filters ---------------------------------------------------------------------------------------------------------


@given(
    kind=st.integers(0, 7), types=st.integers(0, 7), events=st.integers(0, 0x7FF), wanted=st.integers(0, 0x7FF),
    latency=st.integers(0, 4095), least=st.integers(0, 4095),
)  # fmt: skip
@settings(deadline=None)
def test_rule_19_filters_are_combined_by_and(
    kind: int, types: int, events: int, wanted: int, latency: int, least: int
) -> None:
    bench = Bench()
    v = bench.v
    v.pmsfcr = (wanted != 0) | (types != 0) << 1 | (least != 0) << 2 | types << 16
    v.pmsevfr, v.pmslatfr = wanted, least
    keep = (types == 0 or kind & types != 0) and events & wanted == wanted and latency >= least
    assert module("machine.spu").rejected(v, kind, events, latency) == (not keep)


@pytest.mark.parametrize(("latency", "kept"), [(19, False), (20, True), (21, True)])
def test_rule_19_the_least_latency_is_kept(latency: int, kept: bool) -> None:
    bench = Bench(workload=one_kind(latency=latency))
    bench.v.pmsfcr, bench.v.pmslatfr = 1 << 2, 20
    bench.run(5 * 513 * OP_PS)
    assert (bench.tr.written > 0, bench.tr.filtered > 0) == (kept, not kept)


def test_rule_20_an_atomic_is_a_load_and_a_store() -> None:
    v = Bench().v
    for types in range(1, 8):
        v.pmsfcr = 1 << 1 | types << 16
        assert module("machine.spu").rejected(v, 6, 0b10, 1) == (types & 6 == 0)


def test_rule_28_latency_counters_saturate() -> None:
    for bits, kept in ((12, False), (16, True)):
        cpu = Cpu(max_record_bytes=64, align_bytes=64, counter_bits=bits)
        bench = Bench(cpu=cpu, interval=4096 * 2, workload=one_kind(latency=5000))
        bench.v.pmsfcr, bench.v.pmslatfr = 1 << 2, 4096
        bench.run(4 * 8193 * OP_PS)
        assert (bench.tr.written > 0) == kept
        assert bench.tr.selected > 0


# ---- writing and buffer full -----------------------------------------------------------------------------------------


@given(
    kind=st.integers(0, 7),
    sizes=st.sampled_from([(64, 1), (64, 4), (64, 16), (64, 64), (128, 64), (2048, 32), (32, 8)]),
)
@settings(deadline=None)
def test_rule_27_records_are_padded_to_the_alignment_and_bounded(kind: int, sizes: tuple[int, int]) -> None:
    """Without context and physical address: branch, load, atomic 45 bytes, store 43, other 36 (reference 4.6)."""
    largest, align = sizes
    bench = Bench(cpu=Cpu(max_record_bytes=largest, align_bytes=align))
    content = {0: 36, 4: 43}.get(kind, 45)
    padded = -(-content // align) * align
    expected = largest if align == largest else min(padded, largest)
    assert module("machine.spu").record_bytes(bench.par, kind) == expected
    assert expected % align == 0


@given(kind=st.integers(0, 7), align=st.sampled_from([1, 4, 16, 64]), records=st.integers(1, 60))
@settings(deadline=None)
def test_rule_29_records_lie_one_behind_the_other(kind: int, align: int, records: int) -> None:
    bench = Bench(cpu=Cpu(max_record_bytes=64, align_bytes=align), workload=one_kind(kind=kind))
    size = int(module("machine.spu").record_bytes(bench.par, kind))
    assert bench.write_records(records) >= records
    assert bench.v.pmbptr == bench.start + int(bench.tr.written) * size


@given(
    largest=st.sampled_from([64, 128, 256, 2048]), align=st.sampled_from([1, 4, 16, 64, 2048]), kind=st.integers(0, 7),
    pages=st.integers(1, 2),
)  # fmt: skip
@settings(deadline=None)
def test_rule_37_the_buffer_is_full_when_the_largest_record_does_not_fit(
    largest: int, align: int, kind: int, pages: int
) -> None:
    """Full means PTR > LIMIT - 2^MaxSize, strictly: S=1, EC=0, BSC=1, DL as it was, and nothing is lost."""
    align = min(align, largest)
    bench = Bench(
        cpu=Cpu(max_record_bytes=largest, align_bytes=align),
        limit_pages=pages,
        workload=one_kind(kind=kind),
        interval=256,
    )
    size = int(module("machine.spu").record_bytes(bench.par, kind))
    fit = (pages * PAGE - largest) // size + 1  # the last one that starts at or below LIMIT - 2^MaxSize
    assert bench.write_records(10**6) == fit
    assert bench.stopped
    assert bench.syndrome | {"COLL": 0} == {"EC": 0, "DL": 0, "EA": 0, "S": 1, "COLL": 0, "MSS": 1}
    assert bench.v.pmbptr == bench.start + fit * size <= bench.limit
    assert bench.lost() == {}
    assert bench.tr.buffer_full == 1
    tail = bench.limit - int(bench.v.pmbptr)
    assert tail == 0 if size == largest else 0 <= tail < largest


def test_rule_37_room_for_exactly_one_more_largest_record_is_not_full() -> None:
    bench = Bench(limit_pages=1)
    bench.write_records(PAGE // 64 - 1)
    assert bench.v.pmbptr == bench.limit - 64
    assert not bench.stopped
    bench.write_records(1)
    assert bench.v.pmbptr == bench.limit
    assert bench.stopped


# ---- faults ----------------------------------------------------------------------------------------------------------

Damage = Callable[[Bench, int], None]


def _stage1(edit: Callable[[int], int]) -> Damage:
    return lambda bench, n: bench.edit_stage1(n, edit)


def _stage2(edit: Callable[[int], int]) -> Damage:
    return lambda bench, n: bench.edit_stage2(bench.buffer_page(n), edit)


FAULTS: dict[str, tuple[Damage, int, int]] = {
    "stage 1 invalid": (_stage1(lambda d: d & INVALID), EC_STAGE1, 0x07),
    "stage 1 access flag": (_stage1(lambda d: d & NO_ACCESS_FLAG), EC_STAGE1, 0x0B),
    "stage 1 read-only": (_stage1(lambda d: d | 1 << 7), EC_STAGE1, 0x0F),
    "stage 2 invalid": (_stage2(lambda d: 0), EC_STAGE2, 0x07),
    "stage 2 access flag": (_stage2(lambda d: d & NO_ACCESS_FLAG), EC_STAGE2, 0x0B),
    "stage 2 read-only": (_stage2(lambda d: d & ~(1 << 7)), EC_STAGE2, 0x0F),
    "IPA beyond stage 2": (_stage1(lambda d: d & ~0xFFFF_FFFF_F000 | 1 << 44), EC_STAGE2, 0x04),
}
NO_HARDWARE_AF = Cpu(max_record_bytes=64, align_bytes=64, hardware_access_flag=False)


@pytest.mark.parametrize("kind", FAULTS)
def test_rule_38_a_fault_stops_the_unit_and_pmbptr_is_the_address(kind: str) -> None:
    damage, ec, fsc = FAULTS[kind]
    bench = Bench(cpu=NO_HARDWARE_AF, virtualized=True)
    damage(bench, 1)
    assert bench.write_records(1000) == PAGE // 64
    assert bench.syndrome == {"EC": ec, "DL": 0, "EA": 0, "S": 1, "COLL": 0, "MSS": fsc}
    assert bench.v.pmbptr == bench.start + PAGE
    assert sum(bench.lost().values()) == 1
    assert (bench.tr.stage1_faults, bench.tr.stage2_faults) == ((1, 0) if ec == EC_STAGE1 else (0, 1))


def test_rule_38_nothing_marks_a_stage_2_fault_on_a_stage_1_table() -> None:
    """The level is that of stage 2, the address is the buffer's VA: as if the page itself had faulted."""
    bench = Bench(virtualized=True)
    slot, _ = bench.stage1_leaf(bench.start)
    frame = bench.frame_of(slot)
    table = int(np.flatnonzero(bench.m.host_page[0] & 0xFFFF_FFFF == frame)[0])
    bench.edit_stage2(table, lambda d: 0)
    bench.write_records(1)
    assert bench.syndrome == {"EC": EC_STAGE2, "DL": 0, "EA": 0, "S": 1, "COLL": 0, "MSS": 0x07}
    assert bench.v.pmbptr == bench.start


@given(
    n=st.integers(0, 3), first=st.integers(0, 4 * 64 - 2), kind=st.sampled_from(["stage 1 invalid", "stage 2 invalid"])
)
@settings(deadline=None)
def test_rule_39_fixed_records_are_never_cut(n: int, first: int, kind: str) -> None:
    """64-byte records at 64-byte alignment: a fault is always at a page, with DL=0."""
    bench = Bench(virtualized=True)
    bench.v.pmbptr = bench.start + first * 64
    FAULTS[kind][0](bench, n)
    bench.write_records(1000)
    assert bench.syndrome["DL"] == 0
    assert bench.v.pmbptr % 64 == 0
    if first // 64 <= n:
        assert bench.syndrome["EC"] == FAULTS[kind][1]
        assert bench.v.pmbptr == max(bench.start + n * PAGE, bench.start + first * 64)
    else:
        assert bench.syndrome["EC"] == 0  # went on to the end of the buffer


@given(align=st.sampled_from([1, 4, 16]), kind=st.integers(0, 7), n=st.integers(1, 3), at_boundary=st.booleans())
@settings(deadline=None)
def test_rule_38_a_record_cut_by_a_page_that_is_gone_sets_dl(align: int, kind: int, n: int, at_boundary: bool) -> None:
    """DL=1 exactly if PTR is not the first byte behind the last whole record, or always where RYZJQX is used for it."""
    cpu = Cpu(max_record_bytes=64, align_bytes=align, data_loss_at_boundary=at_boundary)
    bench = Bench(cpu=cpu, workload=one_kind(kind=kind), virtualized=True)
    size = int(module("machine.spu").record_bytes(bench.par, kind))
    FAULTS["stage 2 invalid"][0](bench, n)
    bench.write_records(10**6)
    whole = bench.start + int(bench.tr.written) * size
    assert bench.v.pmbptr == bench.start + n * PAGE, "bytes are written one after the other up to the boundary"
    assert bench.syndrome["DL"] == int(whole != bench.v.pmbptr or at_boundary)
    assert bench.tr.data_loss == bench.syndrome["DL"]
    assert 0 <= int(bench.v.pmbptr) - whole < size
    assert bench.lost() == {int(LostCause.STAGE2_NOT_PINNED): 1}


def test_rule_40_the_faulting_sample_is_lost_and_no_other_is_taken() -> None:
    bench = Bench(virtualized=True)
    FAULTS["stage 2 invalid"][0](bench, 0)
    bench.write_records(1)
    assert bench.stopped
    selected = int(bench.tr.selected)
    for _ in range(20):
        bench.run(int(bench.v.now_ps) + 513 * OP_PS)
    assert bench.tr.selected == selected
    assert bench.tr.selected == bench.tr.written + sum(bench.lost().values()) == 1


def test_rule_43_while_stopped_a_later_event_changes_nothing() -> None:
    bench = Bench(limit_pages=1, workload=one_kind(latency=1))
    bench.write_records(1000)
    before = (int(bench.v.pmbsr), int(bench.v.pmbptr), int(bench.v.irq_ps))
    bench.v.flight = 1  # an operation that was sampled before completes now, on a page that is gone
    bench.edit_stage1(0, lambda d: 0)
    bench.call("spu.drain", 0)
    assert (int(bench.v.pmbsr), int(bench.v.pmbptr), int(bench.v.irq_ps)) == before


@given(n=st.integers(0, 3))
@settings(deadline=None)
def test_rule_45_after_a_fault_with_dl_0_the_stream_goes_on_where_it_stopped(n: int) -> None:
    """Mapping repaired, S cleared: the same PMBPTR, no gap, and only the faulting sample is missing."""
    bench, whole = Bench(virtualized=True), Bench(virtualized=True)
    page = bench.buffer_page(n)
    descriptor = bench.stage2_leaf(page)
    bench.edit_stage2(page, lambda d: 0)
    before = bench.write_records(10**6)
    assert before == n * 64
    bench.edit_stage2(page, lambda d: descriptor)
    _resume(bench)
    pointer = int(bench.v.pmbptr)
    assert pointer == bench.start + before * 64
    bench.write_records(10**6)
    whole.write_records(10**6)
    assert bench.v.pmbptr == whole.v.pmbptr == bench.limit
    assert bench.tr.written == whole.tr.written
    assert sum(bench.lost().values()) == 1


def _resume(bench: Bench) -> None:
    one = np.zeros(1, dtype=np.int64)
    module("machine.answers").resume(bench.m, one, one)


def test_rule_45_buffer_full_goes_on_when_the_limit_is_raised() -> None:
    bench = Bench(limit_pages=1)
    bench.write_records(10**6)
    bench.v.pmblimitr += PAGE
    _resume(bench)
    assert bench.write_records(10**6) == 64
    assert bench.v.pmbptr == bench.start + 2 * PAGE


# ---- access flag -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", [True, False])
def test_rule_33_the_unit_sets_the_access_flag_only_if_pmbidr_f_is_1(hardware: bool) -> None:
    """VTCR_EL2.HA is set as KVM sets it; PMBIDR_EL1.F decides whether the SPU honours it."""
    cpu = Cpu(max_record_bytes=64, align_bytes=64, hardware_access_flag=hardware)
    bench = Bench(cpu=cpu, virtualized=True)
    page = bench.buffer_page(0)
    bench.edit_stage2(page, lambda d: d & NO_ACCESS_FLAG)
    bench.write_records(1)
    assert bench.stopped is not hardware
    assert bool(bench.stage2_leaf(page) & 1 << 10) is hardware
    assert bench.tr.stage2_faults == int(not hardware)


def test_rule_33_a_page_that_is_not_written_keeps_its_flag_clear() -> None:
    bench = Bench(virtualized=True)
    page = bench.buffer_page(1)
    bench.edit_stage2(page, lambda d: d & NO_ACCESS_FLAG)
    bench.write_records(64)
    assert not bench.stage2_leaf(page) & 1 << 10
    bench.write_records(1)
    assert bench.stage2_leaf(page) & 1 << 10


# ---- interrupt -------------------------------------------------------------------------------------------------------


def test_rule_46_pmbirq_is_a_level_that_falls_with_s() -> None:
    bench = Bench(limit_pages=1, cpu=FIXED)
    bench.write_records(10**6)
    assert bench.v.irq_ps == bench.v.stop_ps + bench.par.irq_latency_ps
    module("machine.linux_spe").clear_syndrome(bench.v)
    assert bench.v.irq_ps == NEVER
    assert bench.v.virq == 0


def test_rule_46_a_pending_interrupt_waits_until_the_guest_unmasks_it() -> None:
    """Taken by the core while the guest is in its driver: it stays pending, and is taken when the program goes on."""
    bench = Bench(limit_pages=1)
    bench.write_records(10**6)
    bench.v.now_ps = bench.v.irq_ps
    bench.call("kvm.take_interrupt", 0)
    assert bench.v.virq == 1
    bench.v.segment = 3  # Segment.START: interrupts are masked
    next_time = module("machine.lane")._next_time
    bench.v.segment_end_ps = bench.v.now_ps + 1000
    bench.v.exit_next_ps = bench.v.preempt_next_ps = NEVER
    assert next_time(bench.m, 0, 0) == bench.v.now_ps + 1000
    bench.v.segment = 0
    assert next_time(bench.m, 0, 0) == bench.v.now_ps


def test_rule_49_a_drain_writes_the_record_in_flight() -> None:
    bench = Bench(workload=one_kind(latency=1000))
    selections(bench, 1)
    assert bench.tr.written == 0
    bench.call("spu.drain", 0)
    assert bench.tr.written == 1
    assert bench.v.pmbptr == bench.start + 64
    bench.call("spu.drain", 0)
    assert bench.tr.written == 1


def test_latencies_are_the_shortest_plus_an_exponential_part() -> None:
    """A workload says the shortest total latency of an operation and the mean of what comes on top."""
    bench = Bench(workload=one_kind(latency=10, spread=100), interval=8192, buffer_pages=16, log_rows=1500)
    n = bench.write_records(400)
    assert n == 400
    rows = bench.m.log[0, : int(bench.vm.log_count)]
    total = np.array([int(row[4]) & 0xFFFF for row in rows if int(row[2]) & 0xFFFF == LogKind.WRITTEN])
    assert len(total) == n
    assert total.min() >= 10
    assert abs(total.mean() - 110) < 4 * 100 / n**0.5
    assert abs(total.std() - 100) < 25
