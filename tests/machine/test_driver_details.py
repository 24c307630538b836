"""The guest's driver and the guest against itself, in detail: filters, flags, accesses that trap, pages touched; which
translations an SPU may keep; what the event log says of what a vCPU executes.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spepolicy.machine.guestacts import GuestAct
from spepolicy.machine.hostops import Notifier
from spepolicy.machine.scenario import GuestDriver
from spepolicy.machine.state import NEVER, LostCause, Segment
from spepolicy.machine.trace import LogKind

from .interpreted import module
from .spu_bench import PAGE, Bench, one_kind
from .test_linux_spe import driver
from .test_misbehaviour import bench as misbehaving
from .test_misbehaviour import perform

S, COLL, DL = 1 << 17, 1 << 16, 1 << 19
FULL = 0x01


# ---- start, stop, interrupt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "mask", "inverted", "sources"), list(itertools.product([0, 6], [0, 4], [0, 0b1000], [0, 1 << 8]))
)
def test_rule_21_each_filter_is_on_where_its_register_holds_something(
    types: int, mask: int, inverted: int, sources: int
) -> None:
    """PMSFCR_EL1: FE 0, FT 1, FL 2, FnE 3, FDS 4 (spe.md 1.6); a mask alone is a type filter too (FEAT_SPE_EFT)."""
    lane = driver(
        4, 64, 64, type_filter=types, type_mask=mask, inverted_event_filter=inverted, data_source_filter=sources
    )
    lane.call("linux_spe.start_sampling", 0)
    v = lane.v
    on = (types != 0 or mask != 0) << 1 | (inverted != 0) << 3 | (sources != 0) << 4
    assert int(v.pmsfcr) & 0b11111 == on
    assert (int(v.pmsnevfr), int(v.pmsdsfr)) == (inverted, sources)
    registers = module("arch.registers")
    assert int(v.pmsfcr) >> registers.PMSFCR_MASK_SHIFT & 31 == mask
    assert int(v.pmsfcr) >> registers.PMSFCR_TYPE_SHIFT & 31 == types


@pytest.mark.parametrize("event", [0, S | FULL, S | 0x24 << 26 | 7])
@pytest.mark.parametrize("coll", [0, COLL])
@pytest.mark.parametrize("dl", [0, DL])
def test_stop_hands_over_with_the_flags_of_the_syndrome(event: int, coll: int, dl: int) -> None:
    """spe.md 3.4 and 3.5: DL sets TRUNCATED and PARTIAL, COLL sets COLLISION, also where nothing stopped the SPU."""
    lane = driver(4, 64, 64, head=PAGE + 640, tail=PAGE)
    lane.call("linux_spe.output_begin", 0)
    v = lane.v
    v.pmbptr += 10 * 64
    v.pmbsr = event | coll | (dl if event else 0)
    lane.call("linux_spe.stop_buffer", 0)
    expected = (8 if coll else 0) | (1 | 4 if event and dl else 0)
    assert int(v.aux_flags) == expected
    assert int(v.aux_head) == PAGE + 640 + 640, "PMBPTR minus head, whatever lies before the head"
    assert (int(v.pmbsr), int(v.handle_open), int(v.pmblimitr) & 1) == (0, 0, 0)


@pytest.mark.parametrize(
    ("syndrome", "pmb", "pms"),
    [(0, 1, 0), (S | FULL, 5, 0), (S | 0x25 << 26 | 7, 4, 1), (S | DL | FULL, 4, 1)],
)  # fmt: skip
def test_the_handler_s_accesses_trap_one_by_one(syndrome: int, pmb: int, pms: int) -> None:
    """spe.md 3.4: PMBSR is read, then PMBPTR; a new session writes PMBPTR and PMBLIMITR, a fatal event PMSCR and
    PMBLIMITR; at last PMBSR=0.
    """
    for trap_pmb, trap_pms in itertools.product((False, True), repeat=2):
        bench = Bench(virtualized=True, trap_pmb=trap_pmb, trap_pms=trap_pms)
        bench.call("linux_spe.output_begin", 0)
        bench.v.pmbsr = bench.v.guest_pmbsr = syndrome
        before = int(bench.tr.traps)
        bench.call("linux_spe.handle_interrupt", 0)
        assert int(bench.tr.traps) - before == pmb * trap_pmb + pms * trap_pms


@pytest.mark.parametrize(
    ("head", "tail", "discard", "writes"),
    [(0, 0, False, 2), (4 * PAGE - 1, 0, False, 1), (4 * PAGE - 64, 0, False, 1), (0, 0, True, 1)],
)
def test_a_session_s_start_writes_the_limit_and_where_there_is_room_the_pointer(
    head: int, tail: int, discard: bool, writes: int
) -> None:
    """spe.md 3.2. Without room the limit is written as 0; with FM=discard the pointer means nothing (rule 23)."""
    for trap_pmb, trap_pms in itertools.product((False, True), repeat=2):
        bench = Bench(virtualized=True, trap_pmb=trap_pmb, trap_pms=trap_pms, guest={"discard": discard})
        bench.v.aux_head, bench.v.aux_tail = head, tail
        before = int(bench.tr.traps)
        bench.call("linux_spe.output_begin", 0)
        assert int(bench.tr.traps) - before == writes * trap_pmb
        assert int(bench.v.pmblimitr) & 1 == int(head == 0)


@pytest.mark.parametrize("trapped", [False, True])
def test_where_the_syndrome_traps_the_guest_reads_kvms(trapped: bool) -> None:
    """But for COLL, which KVM cannot keep: the hardware may set it at any time."""
    bench = Bench(virtualized=True, trap_pmb=trapped)
    for own, hardware in itertools.product((0, S | FULL), (0, COLL, S | 0x25 << 26 | 7, S | COLL | DL)):
        bench.v.guest_pmbsr, bench.v.pmbsr = own, hardware
        seen = module("machine.linux_spe").visible_syndrome(bench.par, bench.v)
        assert int(seen) == (own | hardware & COLL if trapped else hardware)


@pytest.mark.parametrize(("tail", "head", "touched"), [(PAGE, 2 * PAGE + 64, {1, 2}), (3 * PAGE, 5 * PAGE, {3, 0})])
def test_the_reader_touches_the_pages_that_it_reads(tail: int, head: int, touched: set[int]) -> None:
    """perf's CPU faults in what stage 2 has lost, at its place in the ring, and nothing else."""
    bench = Bench(virtualized=True)
    for n in range(4):
        bench.edit_stage2(bench.buffer_page(n), lambda d: 0)
    bench.v.aux_tail, bench.v.aux_head = tail, head
    bench.call("linux_spe.read_ring", 0)
    assert {n for n in range(4) if bench.stage2_leaf(bench.buffer_page(n)) & 1} == touched
    assert bench.tr.cpu_faults == len(touched)
    assert bench.v.reader_ps == NEVER


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("virtualized", [False, True])
def test_new_aux_pages_cost_a_fault_each_where_stage_2_has_none(virtualized: bool, mapped: bool) -> None:
    """The kernel zeroes them when it allocates them; `buffer_mapped=False` says that it does not."""
    bench = Bench(virtualized=virtualized, guest={"buffer_mapped": mapped})
    layout = module("machine.layout")
    if virtualized:
        for n in range(2):
            page = int(layout.guest_page(bench.par, 0, 1, n))
            bench.edit_stage2(page, lambda d: 0)
    host = int(bench.v.host_ps)
    old = [bench.buffer_page(n) for n in range(4)]
    bench.call("linux_spe.renew_buffer", 0)
    faults = 2 if virtualized and mapped else 0
    assert bench.tr.cpu_faults == faults
    assert int(bench.v.host_ps) - host == int(bench.tr.other_host_ps) == faults * bench.par.cpu_fault_ps
    hostpage = module("machine.hostpage")
    roles = (bench.m.host_page[0] & hostpage.ROLE_MASK) >> hostpage.ROLE_SHIFT
    assert {int(roles[page]) for page in old} == {hostpage.ROLE_OTHER}
    assert {int(roles[bench.buffer_page(n)]) for n in range(4)} == {hostpage.ROLE_BUFFER}


def test_the_end_of_a_handle_closes_it_whatever_is_handed_over() -> None:
    for size in (0, 640):
        lane = driver(4, 64, 64)
        lane.v.handle_open = 1
        lane.call("linux_spe.output_end", 0, size)
        assert (int(lane.v.handle_open), int(lane.v.aux_head)) == (0, size)


# ---- FreeBSD's and Windows' drivers ----------------------------------------------------------------------------------


def freebsd(syndrome: int, vcpus: int = 1) -> Bench:
    bench = Bench(virtualized=True, trap_pmb=True, trap_pms=True, guest={"driver": GuestDriver.FREEBSD, "vcpus": vcpus})
    for k in range(vcpus):
        bench.call("linux_spe.output_begin", k)
        row = module("machine.rows").vcpu_row(bench.m, 0, k)
        row.pmscr, row.event_active = 3, 1
    bench.v.pmbsr = bench.v.guest_pmbsr = syndrome
    bench.v.pmbptr += 640
    bench.tr.written = bench.tr.pending = 10
    return bench


@pytest.mark.parametrize("dl", [0, DL])
def test_freebsd_goes_on_after_a_full_buffer_whatever_dl_says(dl: int) -> None:
    """arm_spe_intr(): PMBSR_EL1.DL with a full buffer only tells user space that a record may be cut."""
    bench = freebsd(S | FULL | dl)
    before = int(bench.tr.traps)
    assert bench.call("other_drivers.freebsd_interrupt", 0)
    assert (int(bench.v.pmblimitr) & 1, int(bench.v.handle_open), int(bench.v.pmbsr)) == (1, 1, 0)
    assert (int(bench.tr.kept), int(bench.tr.discarded), int(bench.tr.truncated)) == (10, 0, 0)
    assert (int(bench.tr.fatal), int(bench.v.event_active)) == (0, 1)
    assert int(bench.tr.traps) - before == 5


@pytest.mark.parametrize("syndrome", [S | 0x25 << 26 | 7, S | 0x24 << 26 | 7, S | 0x1F << 26, S | 4])
def test_freebsd_ends_the_session_on_all_cpus_at_any_other_event(syndrome: int) -> None:
    """spe.md 3.4 [FBSD]: disable on all CPUs; what was not handed over is gone, and nothing starts it again."""
    bench = freebsd(syndrome, vcpus=2)
    bench.v.stop_cause = LostCause.STAGE2_HOST
    before = int(bench.tr.traps)
    assert not bench.call("other_drivers.freebsd_interrupt", 0)
    for k in range(2):
        v = module("machine.rows").vcpu_row(bench.m, 0, k)
        assert (int(v.pmblimitr) & 1, int(v.pmscr), int(v.pmbsr)) == (0, 0, 0)
        assert (int(v.handle_open), int(v.event_active), int(v.session_over), int(v.restart)) == (0, 0, 1, 0)
        assert int(v.stop_cause) == LostCause.STAGE2_HOST
    assert (int(bench.tr.discarded), int(bench.tr.kept), int(bench.tr.fatal)) == (10, 0, 1)
    # PMBSR read, arm_spe_disable(): PMSCR, then PMBLIMITR and PMBPTR, and PMBSR=0.
    assert int(bench.tr.traps) - before == 1 + 1 + 2 + 1
    bench.call("linux_spe.read_ring", 0)
    assert int(bench.v.event_active) == 0, "reading does not enable what is over"


def test_freebsd_takes_an_interrupt_without_an_event_for_spurious() -> None:
    for syndrome, opened in ((0, 1), (S | FULL, 0)):
        bench = freebsd(syndrome)
        bench.v.handle_open = opened
        assert not bench.call("other_drivers.freebsd_interrupt", 0)
        assert (int(bench.tr.spurious), int(bench.tr.fatal), int(bench.v.pmbsr)) == (1, 0, 0)


# ---- a guest against itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [GuestAct.FREE_TABLE, GuestAct.REUSE_TABLE, GuestAct.BALLOON_TABLE])
@pytest.mark.parametrize("tlbi", [False, True])
def test_a_table_that_goes_takes_the_translations_of_its_2_mib_along(act: GuestAct, tlbi: bool) -> None:
    """With a TLBI; without, the SPU goes on with what it has, astray."""
    b = misbehaving(act, tlbi=tlbi)
    first = b.start >> 12
    rows = [first, first + 3, first + 511, first + 512, first - 1]
    for slot, va in enumerate(rows):
        b.m.tlb[0, 0, slot] = (va, 7, 8, 0)
    b.v.tlb_page = first + 3
    b.v.pmbptr = b.start + 3 * PAGE
    perform(b)
    assert [bool(b.m.tlb[0, 0, n, 0] == va) for n, va in enumerate(rows)] == [not tlbi] * 3 + [True] * 2
    stray = module("machine.state").STRAY
    assert [bool(b.m.tlb[0, 0, n, 3] & stray) for n in range(5)] == [not tlbi] * 3 + [False] * 2
    assert (int(b.v.tlb_page) == first + 3) == (not tlbi)
    assert bool(b.tr.diverged_now & stray) == (not tlbi)


def test_an_act_is_on_the_page_that_the_spu_writes_to_next() -> None:
    b = misbehaving(GuestAct.UNMAP, pages=1)
    b.v.pmbptr = b.start + 2 * PAGE + 0x340
    perform(b)
    assert [b.translate(b.start + n * PAGE)[0] & 0x3F for n in range(4)] == [0, 0, 7, 0]
    off = misbehaving(GuestAct.UNMAP, pages=1)
    off.v.pmblimitr &= ~1
    off.v.aux_head = 5 * PAGE + 64
    perform(off)
    assert [off.translate(off.start + n * PAGE)[0] & 0x3F for n in range(4)] == [0, 7, 0, 0], "where the ring goes on"


@pytest.mark.parametrize("enabled", [0, 1])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_guest_is_to_blame_for_a_page_that_was_never_mapped_behind_an_enabled_buffer(
    enabled: int, mapped: bool
) -> None:
    b = Bench(virtualized=True)
    b.v.pmblimitr = b.limit | enabled
    page = 77
    if not mapped:
        b.edit_stage2(page, lambda d: 0)
    b.call("misbehave.blame_guest", 0, page)
    hostpage = module("machine.hostpage")
    blamed = int(b.m.host_page[0, page]) & hostpage.GONE_MASK == hostpage.GONE_GUEST << hostpage.GONE_SHIFT
    assert blamed == (enabled == 1 and not mapped)


def test_a_forged_syndrome_is_a_stage_2_abort_every_other_time_and_else_anything() -> None:
    """kvm.md G8. EC is six bits, MSS sixteen, DL and EA come and go."""
    syndrome = module("machine.misbehave")._syndrome
    seen = set()
    for bits in range(0, 1 << 12, 5):
        word = int(syndrome(bits | (bits * 77 & 0xFFFF) << 16))
        ec = word >> 26
        assert ec == (0x25 if bits % 2 == 0 else bits >> 1 & 0x3F)
        assert bool(word & DL) == bool(bits >> 8 & 1)
        assert bool(word & 1 << 18) == bool(bits >> 9 & 1)
        assert word & 0xFFFF == bits * 77 & 0xFFFF
        assert not word & S
        seen.add(ec)
    assert len(seen) == 64


@pytest.mark.parametrize("ignored", [False, True])
def test_a_ballooned_table_stays_for_the_spu_where_a_filter_keeps_a_pinned_page(ignored: bool) -> None:
    """kvm.md H7 and H8: the VMM's zero page is not what stage 2 shows; else all that follows is zero."""
    b = misbehaving(GuestAct.BALLOON_TABLE, notifier_filter=int(Notifier.CLEAR) if ignored else 0)
    slot, entry = b.call("misbehave.level2_entry", b.start)
    page = ((int(b.m.pool[0, slot, entry]) & 0xFFFF_FFFF_F000) >> 12) - int(b.par.ram_page0)
    hostpage = module("machine.hostpage")
    b.m.host_page[0, page] += hostpage.PIN_ONE
    role = int(b.m.host_page[0, page]) & hostpage.ROLE_MASK
    perform(b)
    assert bool(b.stage2_leaf(page) & 1) == ignored
    assert int(b.m.host_page[0, page]) & hostpage.ROLE_MASK == role
    blamed = int(b.m.host_page[0, page]) & hostpage.GONE_MASK == hostpage.GONE_GUEST << hostpage.GONE_SHIFT
    assert blamed == (not ignored)
    assert b.write_records(1) == int(ignored)


def test_a_device_or_a_page_that_is_no_memory_has_no_level_2_entry() -> None:
    b = misbehaving(GuestAct.FREE_TABLE)
    assert b.call("misbehave.level2_entry", b.start)[0] >= 0
    root = int(b.vm.ttbr1)
    for outside in (0, (int(b.par.ram_page0) + int(b.par.ram_pages)) << 12):
        b.vm.ttbr1 = outside
        assert b.call("misbehave.level2_entry", b.start) == (-1, 0)
    b.vm.ttbr1 = root
    slot = b.slot_of(int(b.m.host_page[0, (root >> 12) - int(b.par.ram_page0)]) & module("machine.hostpage").FRAME)
    b.m.pool[0, slot, :] = 0
    assert b.call("misbehave.level2_entry", b.start) == (-1, 0), "and none where a table is missing"


# ---- the event log ---------------------------------------------------------------------------------------------------


def rows_of(bench: Bench, kind: LogKind) -> list[tuple[int, int, int]]:
    rows = bench.m.log[0, : int(bench.vm.log_count)]
    return [(int(r[2]) >> 32, int(r[3]), int(r[4])) for r in rows if int(r[2]) & 0xFFFF == kind]


def test_the_log_notes_each_change_of_what_is_executed_and_nothing_twice() -> None:
    bench = Bench(virtualized=True, log_rows=200)
    v = bench.v
    bench.vm.log_count = 0
    v.logged_segment = 0
    expected, profiled = [], []
    states = [(Segment.USER, 0, 0, 0), (Segment.USER, 1, 0, 0), (Segment.KERNEL, 1, 0, 0), (Segment.KERNEL, 1, 1, 0),
              (Segment.KERNEL, 1, 1, 3), (Segment.KERNEL, 0, 1, 3), (Segment.IRQ_HANDLER, 0, 1, 3)]  # fmt: skip
    active = False
    for n, (segment, level, task, distribution) in enumerate(states):
        v.segment, v.level, v.task, v.distribution = segment, level, task, distribution
        was, active = active, n % 3 != 0
        if n == 0 or was != active:
            profiled.append((int(active), 0, 0))
        for _ in range(3):
            bench.call("trace.log_state", 0, active)
        expected.append((int(segment), level, distribution | task << 16))
    assert rows_of(bench, LogKind.SEGMENT) == expected
    assert rows_of(bench, LogKind.PROFILING) == profiled


def test_a_sample_has_an_instruction_of_its_function_and_the_level_it_was_taken_at() -> None:
    """Each function has 256 instructions of four bytes, every eighth of one type (spepolicy.machine.trace)."""
    trace = module("machine.trace")
    for level, task, kind in itertools.product((0, 1), (0, 1), (0, 1, 2, 4)):
        bench = Bench(virtualized=True, log_rows=300, workload=one_kind(kind=kind))
        bench.vm.log_count = 0
        bench.v.level, bench.v.task = level, task
        with np.errstate(over="ignore"):
            for counter in range(250):
                bench.call("trace.log_selection", 0, 1000, 0, counter)
        rows = rows_of(bench, LogKind.SELECTED)
        assert {detail for detail, _, _ in rows} == {level << 16 | task << 17}
        offsets = {offset for _, offset, _ in rows}
        assert all(0 <= offset < trace.FUNCTION_BYTES and offset % 32 == 4 * kind for offset in offsets)
        assert len(offsets) > 10, "some are hot, all are possible"
        hits = np.array([offset for _, offset, _ in rows])
        assert (hits < trace.FUNCTION_BYTES // 4).mean() > 0.4, "low ones are hot: the product of two uniform numbers"


def test_records_are_booked_to_the_cause_that_the_judge_knows() -> None:
    """Who removed the stage 2 entry, and what an access flag or an address outside memory says (kvm.md 4.5)."""
    bench = Bench(virtualized=True)
    hostpage, walker = module("machine.hostpage"), module("mmu.walker")
    page = bench.buffer_page(0)
    ipa = (int(bench.par.ram_page0) + page) << 12
    plain = int(bench.m.host_page[0, page])
    translation = walker.STAGE2 | 0x04 | 3
    events = module("machine.spu_events")
    expected = {
        hostpage.GONE_NEVER: events.CAUSE_NOT_PINNED, hostpage.GONE_HOST: events.CAUSE_HOST,
        hostpage.GONE_GUEST: events.CAUSE_GUEST, hostpage.GONE_BUG: events.CAUSE_KVM_BUG,
        hostpage.GONE_MIGRATION: events.CAUSE_MIGRATION,
    }  # fmt: skip
    for gone, cause in expected.items():
        bench.m.host_page[0, page] = plain | gone << hostpage.GONE_SHIFT
        assert bench.call("spu_write._true_cause", translation, ipa) == cause
        skipped = plain | gone << hostpage.GONE_SHIFT | hostpage.SKIPPED
        bench.m.host_page[0, page] = skipped
        bug = events.CAUSE_KVM_BUG if gone == hostpage.GONE_NEVER else cause
        assert bench.call("spu_write._true_cause", translation, ipa) == bug
        bench.m.host_page[0, page] = skipped | hostpage.PIN_ONE
        assert bench.call("spu_write._true_cause", translation, ipa) == cause, "another vCPU has pinned it"
    for level in (0, 3):
        assert bench.call("spu_write._true_cause", walker.STAGE2 | 0x08 | level, ipa) == events.CAUSE_HOST
    for outside in (ipa - (page + 1 << 12), ipa + (int(bench.par.ram_pages) - page << 12)):
        assert bench.call("spu_write._true_cause", translation, outside) == events.CAUSE_GUEST
