"""More of the SPU's rules by their numbers in section 2 of the SPE reference: what is sampled, what a record has, what
is filtered, errors. `test_spu_rules.py` has the interval counter, writing, faults and the interrupt.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.alias import TABLE_DRAWS, alias_table
from spepolicy.arch.registers import REGISTERS
from spepolicy.machine.scenario import Cpu, ExternalAbort, Guest, OpType, Workload
from spepolicy.machine.state import LostCause
from spepolicy.machine.trace import LOG, LogKind, samples

from .interpreted import module
from .spu_bench import FIXED, OP_PS, PAGE, Bench, one_kind

INVALID = ~1
PACKED = Cpu(max_record_bytes=64, align_bytes=1)


def log_of(bench: Bench) -> list[tuple[int, int, int, int]]:
    """Return (kind, detail, a, b) of the rows of the bench's log, unsigned."""
    rows = bench.m.log[0, : int(bench.vm.log_count)]
    return [(int(r[2]) & 0xFFFF, int(r[2]) >> 32, int(r[3]), int(r[4])) for r in rows]


def loop(*kinds: int, latency: int = 1) -> Workload:
    """A program that is one loop: operation n of the body is in function n."""
    zero = np.zeros(1, dtype=np.int64)
    count = len(kinds)
    threshold, choice = alias_table([TABLE_DRAWS // count + (n < TABLE_DRAWS % count) for n in range(count)])
    return replace(
        one_kind(), function_names=tuple(f"f{n}" for n in range(count)), alias_threshold=threshold[None],
        alias_outcome=choice[None], weight=np.full((1, count), 1 / count), outcome_function=np.arange(count),
        outcome_type=np.array(kinds), outcome_events=np.full(count, 0b10),
        outcome_latency_cycles=np.full(count, latency), outcome_spread_cycles=np.zeros(count, np.int64),
        loop_first=zero, loop_length=zero + count, loop_outcome=np.arange(count),
    )  # fmt: skip


def picked(bench: Bench, count: int) -> list[int]:
    """Return how often each function was sampled in *count* intervals."""
    for _ in range(count):
        bench.run(int(bench.v.now_ps) + (int(bench.v.pmsirr) & 0xFFFF_FF00) * OP_PS)
    return [int(n) for n in bench.m.unseen[0, 0]]


# ---- what is sampled -------------------------------------------------------------------------------------------------


def test_rule_8_with_architectural_operations_each_of_a_loop_is_picked_as_often() -> None:
    bench = Bench(interval=256, jitter=True, buffer_pages=64, workload=loop(2, 0, 4, 0, 1))
    counts = picked(bench, 2500)
    total = sum(counts)
    assert total > 1500
    # A fifth each; the standard deviation of a count of independent picks is 18.
    assert all(abs(count - total / 5) < 90 for count in counts)


def test_rule_8_without_jitter_an_interval_in_step_with_a_loop_sees_one_operation() -> None:
    """The period is INTERVAL * 256 + 1; a loop whose length divides it is met at the same place for ever."""
    bench = Bench(interval=1024, workload=loop(*[0] * 25), buffer_pages=16)  # 1025 = 25 * 41
    counts = picked(bench, 60)
    assert sum(count > 0 for count in counts) == 1


@pytest.mark.parametrize(("length", "granule"), [(17, 2), (18, 2), (16, 4), (18, 4), (15, 4)])
def test_rule_8_a_granule_hides_operations_of_loops_that_it_shares_a_factor_with(length: int, granule: int) -> None:
    cpu = replace(FIXED, pick_granule_ops=granule)
    bench = Bench(cpu=cpu, interval=256, jitter=True, buffer_pages=64, workload=loop(*[0] * length))
    counts = picked(bench, 1200)
    step = int(np.gcd(length, granule))
    assert [count > 0 for count in counts] == [n % step == 0 for n in range(length)]


@pytest.mark.parametrize("order_known", [True, False])
def test_rule_8_the_sample_of_a_store_can_slip_to_a_later_operation(order_known: bool) -> None:
    cpu = replace(FIXED, store_slip_q16=1 << 15, store_slip_granules=1)
    program = loop(4, 2, 0, 0)
    if not order_known:
        program = replace(program, loop_first=None, loop_length=None, loop_outcome=None)
    bench = Bench(cpu=cpu, interval=256, jitter=True, buffer_pages=64, workload=program)
    store, load, *others = picked(bench, 3000)
    total = store + load + sum(others)
    # half of the stores' samples go: to the load behind it, or to any operation, the store itself included
    shares = (1 / 8, 3 / 8, 1 / 4, 1 / 4) if order_known else (5 / 32, 9 / 32, 9 / 32, 9 / 32)
    for count, share in zip((store, load, *others), shares, strict=True):
        assert abs(count / total - share) < 0.06


def test_rule_9_a_counter_of_0_is_loaded_and_any_other_goes_on() -> None:
    bench = Bench(interval=768)
    bench.call("spu.run_counter", 0, OP_PS)
    assert bench.v.select_ps == 768 * OP_PS
    module("machine.spu").hold_counter(bench.v, 0)
    bench.v.left_ops = 5
    bench.call("spu.run_counter", 0, OP_PS)
    assert bench.v.select_ps == 5 * OP_PS


@pytest.mark.parametrize(("names", "spread"), [((), range(256)), (("ERnd",), range(256))])
def test_rule_9_the_first_interval_is_random_in_its_low_byte_only_if_jitter_is_on(
    names: tuple[str, ...], spread: range
) -> None:
    first = set()
    for n in range(40):
        bench = Bench(cpu=replace(FIXED, features=names), interval=512, jitter=True)
        bench.v.key_sample = n
        bench.call("spu.run_counter", 0, OP_PS)
        first.add(int(bench.v.left_ops) - 512)
    assert first <= set(spread)
    assert len(first) > 20


def test_rule_12_with_the_secondary_counter_intervals_do_not_drift() -> None:
    """The primary counter reloads every INTERVAL * 256 + 1 operations; each sample is 0 to 255 operations behind that.

    Without the secondary counter the random bytes add up: after 400 intervals their sum is some 50,000 operations.
    """
    offsets = {}
    for names in ((), ("ERnd",)):
        bench = Bench(cpu=replace(FIXED, features=names), interval=512, jitter=True, buffer_pages=64)
        bench.run(0)
        offsets[names] = []
        for n in range(400):
            at = int(bench.v.select_ps) // OP_PS
            offsets[names].append(at - 512 - n * 513)
            bench.run(at * OP_PS)
    assert min(offsets[("ERnd",)]) >= 0
    assert max(offsets[("ERnd",)]) <= 255
    assert len(set(offsets[("ERnd",)])) > 150
    assert offsets[()][-1] > 30_000


# ---- what a record has -----------------------------------------------------------------------------------------------


def test_rule_15_time_and_place_are_those_of_the_selection() -> None:
    bench = Bench(workload=one_kind(latency=100), log_rows=64)
    bench.run(512 * OP_PS)
    bench.run(5000 * OP_PS)
    rows = bench.m.log[0, : int(bench.vm.log_count)]
    kinds = [int(row[2]) & 0xFFFF for row in rows]
    first, second = kinds.index(LogKind.SELECTED), kinds.index(LogKind.WRITTEN)
    assert rows[first][1] == 512 * OP_PS
    assert rows[second][1] == 512 * OP_PS + 100 * int(bench.par.cycle_ps)


@pytest.mark.parametrize("kind", range(8))
def test_rule_16_only_loads_and_stores_have_a_data_address(kind: int) -> None:
    workload = one_kind(kind=kind)
    bench = Bench(workload=workload, log_rows=64)
    bench.write_records(3)
    joined = samples(bench.m.log[0, : int(bench.vm.log_count)].view(LOG)[:, 0], workload)
    assert len(joined) >= 3
    is_access = kind & 6 != 0 and kind & 1 == 0
    if is_access:
        assert (joined["address"] >> np.uint64(32) == 0xAAAB).all()
    else:
        assert (joined["address"] < 1024).all()  # a branch's target in its function, or nothing


@given(kind=st.integers(0, 7), context=st.booleans(), physical=st.booleans(), virtualized=st.booleans())
@settings(deadline=None, max_examples=40)
def test_rule_17_a_record_has_the_packets_that_are_asked_for(
    kind: int, context: bool, physical: bool, virtualized: bool
) -> None:
    """Sizes of reference 4.6: context 5 bytes; a physical address 9, of accesses only, and none for KVM's guests."""
    bench = Bench(
        cpu=PACKED, virtualized=virtualized, workload=one_kind(kind=kind),
        guest={"context": context, "physical_addresses": physical},
    )  # fmt: skip
    plain = {0: 36, 4: 43}.get(kind, 45)
    has_address = physical and not virtualized and kind & 6 != 0
    expected = plain + 5 * context + 9 * has_address
    assert module("machine.spu").record_bytes(bench.par, kind) == min(expected, 64)


# ---- filters ---------------------------------------------------------------------------------------------------------


@given(kind=st.integers(0, 31), control=st.integers(0, 31), mask=st.integers(0, 31))
@settings(deadline=None)
def test_rule_20_masks_divide_types_into_any_of_and_exactly(kind: int, control: int, mask: int) -> None:
    """FEAT_SPE_EFT: of the types without a mask bit one must match, if any is selected; the others must be as said."""
    bench = Bench()
    bench.v.pmsfcr = int(REGISTERS["PMSFCR_EL1"].pack(FT=1)) | control << 16 | mask << 48
    types = [1 << n for n in range(5)]
    wanted = [t for t in types if control & t and not mask & t]
    keep = (not wanted or any(kind & t for t in wanted)) and all(kind & t == control & t for t in types if mask & t)
    assert module("machine.spu").rejected(bench.v, kind, 0b10, 1) == (not keep)


@given(events=st.integers(0, 0x7FF), unwanted=st.integers(1, 0x7FF))
@settings(deadline=None)
def test_rule_19_an_inverted_event_filter_rejects_any_of_its_events(events: int, unwanted: int) -> None:
    v = Bench().v
    v.pmsfcr, v.pmsnevfr = int(REGISTERS["PMSFCR_EL1"].pack(FnE=1)), unwanted
    assert module("machine.spu").rejected(v, 2, events, 1) == (events & unwanted != 0)


SERVED = {0: 0, 1 << 3: 8, 1 << 3 | 1 << 8: 0xB, 1 << 3 | 1 << 8 | 1 << 9: 0xE, 1 << 3 | 3 << 8 | 1 << 10: 0xD}


@pytest.mark.parametrize(("events", "source"), SERVED.items())
@pytest.mark.parametrize("kind", range(8))
def test_rule_19_a_data_source_filter_concerns_loads(events: int, source: int, kind: int) -> None:
    v = Bench().v
    for selected in range(16):
        v.pmsfcr, v.pmsdsfr = int(REGISTERS["PMSFCR_EL1"].pack(FDS=1)), 1 << selected
        is_load = kind & 6 == 2
        assert module("machine.spu").rejected(v, kind, events, 1) == (is_load and selected != source)


EMPTY = {
    "FE with PMSEVFR_EL1=0": {"FE": 1}, "FnE with PMSNEVFR_EL1=0": {"FnE": 1}, "FL with MINLAT=0": {"FL": 1},
    "FT with no types": {"FT": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_rule_21_a_filter_that_selects_nothing_rejects_all_or_nothing(name: str) -> None:
    v = Bench().v
    v.pmsfcr = int(REGISTERS["PMSFCR_EL1"].pack(**EMPTY[name]))
    answers = {
        module("machine.spu").rejected(v, kind, events, latency)
        for kind, events, latency in itertools.product(range(8), (0, 0b10, 0x7FE), (0, 1, 4095))
    }
    assert len(answers) == 1


def test_rule_21_an_event_wanted_and_unwanted_rejects_all() -> None:
    v = Bench().v
    v.pmsfcr = int(REGISTERS["PMSFCR_EL1"].pack(FE=1, FnE=1))
    v.pmsevfr = v.pmsnevfr = 0b1000
    assert all(module("machine.spu").rejected(v, 2, events, 1) for events in range(0, 0x7FF, 7))


# ---- PMU events and discard mode -------------------------------------------------------------------------------------


@given(interval=st.sampled_from([256, 512]), latency=st.sampled_from([1, 700]), least=st.sampled_from([0, 500]))
@settings(deadline=None, max_examples=12)
def test_rule_22_pmu_events_count_the_same_samples(interval: int, latency: int, least: int) -> None:
    cpu = replace(FIXED, cycle_ps=OP_PS)
    bench = Bench(cpu=cpu, interval=interval, workload=one_kind(latency=latency), buffer_pages=16)
    if least:
        bench.v.pmsfcr, bench.v.pmslatfr = 1 << 2, least
    bench.advance(30 * (interval + 1) * OP_PS)
    tr = bench.tr
    assert tr.population == bench.v.now_ps // OP_PS  # SAMPLE_POP: one an operation
    feed = int(tr.selected - tr.collided)  # SAMPLE_FEED
    assert feed == tr.filtered + tr.survived + int(bench.v.flight)
    assert tr.survived == (tr.written if latency >= least else 0)  # SAMPLE_FILTRATE
    assert (tr.collided > 0) == (latency > interval)  # SAMPLE_COLLISION
    assert tr.buffer_full == 0  # SAMPLE_BUFFER_FULL


def test_rule_22_buffer_full_is_counted() -> None:
    bench = Bench(limit_pages=1)
    bench.write_records(10**6)
    assert bench.tr.buffer_full == 1
    assert bench.tr.survived == bench.tr.written


def test_rule_23_in_discard_mode_samples_are_counted_and_nothing_is_written() -> None:
    bench, fill = Bench(limit_pages=1, workload=one_kind(latency=600)), Bench(workload=one_kind(latency=600))
    bench.v.pmblimitr = int(REGISTERS["PMBLIMITR_EL1"].pack(FM=2, E=1))  # PTR and LIMIT are ignored
    bench.v.pmbptr = 0x1234
    for one in (bench, fill):
        one.advance(200 * 513 * OP_PS)
    assert bench.v.pmbptr == 0x1234
    assert bench.syndrome["S"] == 0
    assert bench.tr.written == 0
    for name in ("selected", "collided", "survived", "population"):
        assert getattr(bench.tr, name) == getattr(fill.tr, name) > 0 or name == "collided"
    assert bench.tr.discarded == bench.tr.survived
    assert bench.syndrome["COLL"] == fill.syndrome["COLL"]


def test_rule_23_the_driver_opens_no_aux_session_in_discard_mode() -> None:
    bench = Bench(guest={"discard": True})
    bench.call("linux_spe.output_begin", 0)
    assert bench.v.handle_open == 0
    assert REGISTERS["PMBLIMITR_EL1"].unpack(bench.v.pmblimitr)["FM"] == 2
    assert REGISTERS["PMBLIMITR_EL1"].unpack(bench.v.pmblimitr)["E"] == 1


# ---- the write -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
def test_rule_30_the_write_is_privileged_whatever_executes_and_ignores_pan(level: int) -> None:
    """AP[1]=0 keeps EL0 out and AP[1]=1 would keep EL1 out if PAN counted: the SPU writes through both."""
    for user in (0, 1 << 6):
        bench = Bench(virtualized=True)
        bench.v.level = level
        bench.edit_stage1(0, lambda d, user=user: (d & ~(1 << 6)) | user)
        assert bench.write_records(5) == 5
        assert not bench.stopped


def test_rule_31_a_record_that_was_cut_is_not_continued() -> None:
    """After the repair the next record starts at the faulting address: what lies before it is half a record."""
    bench = Bench(cpu=PACKED, virtualized=True, log_rows=1024)
    page = bench.buffer_page(1)
    descriptor = bench.stage2_leaf(page)
    bench.edit_stage2(page, lambda d: 0)
    bench.write_records(10**6)
    assert bench.syndrome["DL"] == 1
    cut = bench.start + int(bench.tr.written) * 45
    assert cut < bench.v.pmbptr == bench.start + PAGE
    bench.edit_stage2(page, lambda d: descriptor)
    one = np.zeros(1, dtype=np.int64)
    module("machine.answers").resume(bench.m, one, one)
    before = len(log_of(bench))
    bench.write_records(2)
    pointers = [a for kind, _, a, _ in log_of(bench)[before:] if kind == LogKind.WRITTEN]
    assert pointers == [bench.start + PAGE, bench.start + PAGE + 45]


def test_rule_31_every_page_goes_through_both_stages() -> None:
    for edit in ("stage1", "stage2"):
        bench = Bench(virtualized=True)
        if edit == "stage1":
            bench.edit_stage1(2, lambda d: d & INVALID)
        else:
            bench.edit_stage2(bench.buffer_page(2), lambda d: 0)
        assert bench.write_records(10**6) == 2 * PAGE // 64
        assert bench.syndrome["EC"] == (0x24 if edit == "stage1" else 0x25)


def test_rule_32_old_entries_are_used_until_a_tlbi_covers_the_spu() -> None:
    bench = Bench(virtualized=True)
    page = bench.buffer_page(0)
    bench.write_records(3)
    bench.edit_stage2(page, lambda d: 0)
    assert bench.write_records(3) == 3
    ipa_page = int(bench.par.ram_page0) + page
    bench.call("host.invalidate_tlb", ipa_page, ipa_page + 1)
    assert bench.write_records(1) == 0
    assert bench.stopped


# ---- pointers, errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [0, 63, 64, 4096, -(1 << 20)])
def test_rule_34_a_pointer_without_room_for_a_record_writes_nothing(beyond: int) -> None:
    bench = Bench(limit_pages=1)
    bench.v.pmbptr = bench.limit - 63 + beyond if beyond >= 0 else bench.limit
    bench.write_records(1)
    assert bench.tr.written == 0
    assert bench.stopped


def test_rule_41_access_not_allowed_is_told_with_data_loss() -> None:
    bench = Bench(limit_pages=1)
    bench.v.pmbptr = bench.limit
    bench.write_records(1)
    assert bench.syndrome == {"EC": 0, "DL": 1, "EA": 0, "S": 1, "COLL": 0, "MSS": 0}
    assert bench.lost() == {int(LostCause.GUEST_ERROR): 1}
    assert bench.tr.data_loss == 1


@pytest.mark.parametrize("largest", [64, 256, 2048])
def test_rule_35_records_of_a_fixed_size_never_cross_a_page(largest: int) -> None:
    bench = Bench(cpu=Cpu(max_record_bytes=largest, align_bytes=largest), log_rows=1024)
    bench.write_records(10**6)
    for kind, size, pointer, _ in log_of(bench):
        if kind == LogKind.WRITTEN:
            assert pointer // PAGE == (pointer + size - 1) // PAGE


@pytest.mark.parametrize("way", ExternalAbort)
def test_rule_36_a_fault_comes_before_an_external_abort_and_that_before_buffer_full(way: ExternalAbort) -> None:
    always = replace(FIXED, external_abort=way, external_abort_every=1)
    last = Bench(cpu=always, limit_pages=1)
    last.v.pmbptr = last.limit - 64
    last.write_records(1)
    if way >= ExternalAbort.MMU_FAULT:
        assert last.syndrome["MSS"] != 1, "the abort is told, not that the buffer is full"
    faulting = Bench(cpu=always, virtualized=True)
    faulting.edit_stage2(faulting.buffer_page(0), lambda d: 0)
    faulting.write_records(1)
    assert faulting.syndrome == {"EC": 0x25, "DL": 0, "EA": 0, "S": 1, "COLL": 0, "MSS": 0x07}
    assert faulting.tr.external_aborts == 0


REPORT = {  # EC on bare metal, EC in a VM, FSC, EA, DL, PMBPTR_EL1 moves
    ExternalAbort.MMU_FAULT: (0x24, 0x25, 0x17, 0, 0, False),
    ExternalAbort.SYNCHRONOUS: (0x24, 0x24, 0x10, 1, 0, False),
    ExternalAbort.ASYNCHRONOUS: (0x24, 0x24, 0x11, 1, 1, True),
}


@pytest.mark.parametrize("way", REPORT)
@pytest.mark.parametrize("virtualized", [False, True])
def test_rule_42_an_external_abort_that_is_reported_stops_the_spu(way: ExternalAbort, virtualized: bool) -> None:
    bench = Bench(
        cpu=replace(FIXED, external_abort=way, external_abort_every=1), virtualized=virtualized, buffer_pages=4
    )
    bench.write_records(1)
    ec, ec_vm, fsc, ea, dl, moves = REPORT[way]
    expected = {"EC": ec_vm if virtualized else ec, "DL": dl, "EA": ea, "S": 1, "COLL": 0, "MSS": fsc}
    assert bench.syndrome == expected
    assert (bench.v.pmbptr != bench.start) == moves
    assert bench.lost() == {int(LostCause.EXTERNAL_ABORT): 1}
    assert bench.tr.data_loss == dl


@pytest.mark.parametrize("way", [ExternalAbort.IGNORED, ExternalAbort.SERROR])
def test_rule_42_an_external_abort_that_is_not_reported_leaves_pmbsr_alone(way: ExternalAbort) -> None:
    """The SPU goes on behind bytes that were never written; an SError is the core's business."""
    bench = Bench(cpu=replace(FIXED, external_abort=way, external_abort_every=1))
    bench.advance(10 * 513 * OP_PS)
    assert bench.v.pmbsr == 0
    assert bench.tr.written == 0
    assert bench.lost() == {int(LostCause.EXTERNAL_ABORT): int(bench.tr.external_aborts)}
    assert bench.v.pmbptr == bench.start + 64 * int(bench.tr.external_aborts) > bench.start
    assert bench.tr.serrors == (bench.tr.external_aborts if way == ExternalAbort.SERROR else 0)
    until = int(bench.v.now_ps) + 3 * 513 * OP_PS
    assert bench.run(until) == until, "nothing stops it on the way"


@pytest.mark.parametrize("way", [ExternalAbort.IGNORED, ExternalAbort.SERROR])
def test_rule_37_an_abort_that_nobody_tells_leaves_the_buffer_full_where_its_record_was_the_last(
    way: ExternalAbort,
) -> None:
    bench = Bench(cpu=replace(FIXED, external_abort=way, external_abort_every=1), limit_pages=1)
    bench.v.pmbptr = bench.limit - 2 * 64
    bench.advance(20 * 513 * OP_PS)
    assert bench.tr.external_aborts == 2
    assert bench.lost() == {int(LostCause.EXTERNAL_ABORT): 2}
    assert bench.syndrome == {"EC": 0, "DL": 0, "EA": 0, "S": 1, "COLL": 0, "MSS": 1}
    assert (int(bench.tr.buffer_full), int(bench.v.pmbptr)) == (1, bench.limit)
    assert bench.tr.written == 0


def test_rule_42_a_device_page_aborts_as_the_implementation_says() -> None:
    for way in ExternalAbort:
        bench = Bench(cpu=replace(FIXED, external_abort=way))
        bench.edit_stage1(0, lambda d: (d & ~0xFFFF_FFFF_F000) | 1 << 30 >> 2)  # an IPA below RAM, identity without EL2
        bench.run(600 * OP_PS)
        assert bench.tr.external_aborts == 1
        assert bench.stopped == (way >= ExternalAbort.MMU_FAULT)


@pytest.mark.parametrize("late", [0, 1, 5])
def test_rule_40_from_v1p5_on_samples_behind_a_fault_are_lost_until_it_is_reported(late: int) -> None:
    cpu = replace(FIXED, spe_version=6, late_fault_samples=late)
    bench = Bench(cpu=cpu, virtualized=True)
    bench.edit_stage2(bench.buffer_page(1), lambda d: 0)
    bench.write_records(10**6)
    assert bench.syndrome == {"EC": 0x25, "DL": 0, "EA": 0, "S": 1, "COLL": 0, "MSS": 0x07}
    assert bench.v.pmbptr == bench.start + PAGE
    assert bench.lost() == {int(LostCause.STAGE2_NOT_PINNED): 1 + late}
    assert bench.tr.stage2_faults == 1
    assert bench.tr.selected == bench.tr.written + 1 + late


def test_rule_48_a_drain_waits_for_a_fault_to_be_reported() -> None:
    bench = Bench(cpu=replace(FIXED, spe_version=6, late_fault_samples=100), virtualized=True)
    bench.edit_stage2(bench.buffer_page(0), lambda d: 0)
    bench.run(513 * 3 * OP_PS)
    assert bench.tr.stage2_faults == 1
    assert not bench.stopped
    bench.call("spu.drain", 0)
    assert bench.syndrome["S"] == 1
    assert bench.syndrome["EC"] == 0x25


def test_rule_48_the_driver_reads_pmbptr_behind_the_record_that_it_drained() -> None:
    """PMSCR_EL1=0, ISB, PSB CSYNC, DSB: the record in flight is in the buffer before PMBPTR_EL1 is read."""
    bench = Bench(workload=one_kind(latency=10_000))
    bench.v.handle_open = 1
    bench.run(600 * OP_PS)
    assert bench.v.flight == 1
    bench.call("linux_spe.stop_sampling", 0)
    assert bench.v.pmbptr == bench.start + 64
    bench.call("linux_spe.stop_buffer", 0)
    assert bench.v.aux_head == 64


def test_the_defaults_of_the_guest_ask_for_timestamps_only() -> None:
    bench = Bench()
    fields = REGISTERS["PMSCR_EL1"].unpack(bench.par.pmscr)
    assert {name for name, value in fields.items() if value} == {"TS"}
    assert Guest().type_filter == OpType.OTHER
