"""What KVM's tools list, charge and tell, one at a time: walks, sets of pins, events, interrupts, migrations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spepolicy.hookspecs import Event
from spepolicy.machine.guestacts import GuestAct
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import GuestDriver, Handling, Host, HostKind, IrqDelivery, Migration, MigrationKind
from spepolicy.machine.state import NEVER, Hook, LostCause
from spepolicy.machine.trace import LogKind

from .interpreted import module
from .spu_bench import FIXED, PAGE, Bench
from .test_kvm_tools import pin, pins, use
from .test_migration import US, migrating, step

VALID, AF = 1, 1 << 10
S, COLL, DL, EA = 1 << 17, 1 << 16, 1 << 19, 1 << 18


def walk(bench: Bench, first: int, last: int, tables: int = 0) -> int:
    lo, hi = (np.array([bench.start + n * PAGE]) for n in (first, last))
    return int(use(bench, "walking.walk_stage1", lo, hi, tables, 0))


def listed(bench: Bench) -> list[int]:
    return [int(page) for page in bench.m.pins[0, 0, 1 - int(bench.v.pin_list), : int(bench.v.pin_fresh)]]


# ---- walks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beyond", "found"), [(-1, True), (0, False), (7, False)])
def test_a_leaf_that_points_behind_the_vms_memory_has_nothing_to_pin(beyond: int, found: bool) -> None:
    bench = Bench(virtualized=True)
    page = int(bench.par.ram_page0) + int(bench.par.ram_pages) + beyond
    bench.edit_stage1(2, lambda d: (d & ~0xFFFF_FFFF_F000) | page << 12)
    status = walk(bench, 0, 4)
    assert (status == 0) == found
    assert int(bench.v.pin_fresh) == (4 if found else 2), "what was found before is listed"
    assert int(bench.v.walk_hi) == bench.start + (4 if found else 2) * PAGE
    if not found:
        assert status & 0x3F == 0x07, "a translation fault at level 3, as if nothing were mapped"


def test_a_walk_lists_the_tables_as_far_as_they_are_the_guests_memory() -> None:
    bench = Bench(virtualized=True, guest={"acts": ((int(GuestAct.FREE_TABLE), 1, 0, 0, 1, 1),)})
    walk(bench, 0, 1, tables=1)
    whole = listed(bench)
    assert len(whole) == 5, "four tables, then the page"
    assert whole[0] == (int(bench.vm.ttbr1) >> 12) - int(bench.par.ram_page0)
    bench.call("misbehave.free_table", 0, bench.start, 1)
    walk(bench, 0, 1, tables=1)
    assert listed(bench) == whole[:3], "the level 2 table no longer points at one"
    whole_again = Bench(virtualized=True)
    middle = whole_again.slot_of(int(whole_again.m.host_page[0, whole[1]]) & module("machine.hostpage").FRAME)
    entry = (whole_again.start >> 30) & 511
    ordinary = whole_again.buffer_page(3)
    whole_again.m.pool[0, -1, :] = whole_again.m.pool[0, middle, entry]  # a row that nothing uses
    whole_again.m.pool[0, middle, entry] = (int(whole_again.par.ram_page0) + ordinary) << 12 | 3
    walk(whole_again, 0, 1, tables=1)
    assert listed(whole_again) == [*whole[:2], ordinary], "what a descriptor calls a table is listed; it leads nowhere"
    root = int(bench.vm.ttbr1)
    for outside in (0x1000, (int(bench.par.ram_page0) + int(bench.par.ram_pages)) << 12):
        bench.vm.ttbr1 = outside
        walk(bench, 0, 1, tables=1)
        assert listed(bench) == []
    bench.vm.ttbr1 = root
    bench.m.pins[0, 0, 1, :] = -1
    assert all(0 <= page < int(bench.par.ram_pages) for page in whole)


@pytest.mark.parametrize("by_hardware", [False, True])
def test_looking_finds_an_aged_page_only_where_the_spu_faults_on_it(by_hardware: bool) -> None:
    """PMBIDR_EL1.F=0: the SPU does not set access flags, so a page that the host has aged makes it fault."""
    bench = Bench(virtualized=True, cpu=replace(FIXED, hardware_access_flag=by_hardware))
    assert use(bench, "walking.look") == 0
    bench.edit_stage2(bench.buffer_page(0), lambda d: d & ~AF)
    missing = module("machine.walking").LOOK_MISSING
    assert use(bench, "walking.look") == (0 if by_hardware else missing)
    assert bench.write_records(1) == int(by_hardware)


def test_records_have_nowhere_to_go_where_the_guest_has_freed_the_table() -> None:
    """KVM's own buffer has records, the guest's no level 3 table: a translation fault, as a walk would say."""
    bench = Bench(virtualized=True, own_buffer=True)
    bench.v.shadow_ptr, bench.v.shadow_limit = bench.start, (bench.start + 4 * PAGE) | 1
    bench.v.pmbptr = bench.v.pmblimitr = 0
    use(bench, "own_buffer.start_own_buffer", 4)
    assert bench.write_records(20) == 20
    slot, entry = bench.call("misbehave.level2_entry", bench.start)
    bench.m.pool[0, slot, entry] = 0
    assert use(bench, "own_buffer.copy_out", 0) == module("machine.own_buffer").COPY_UNMAPPED
    walker = module("mmu.walker")
    assert int(bench.v.walk_status) == walker.STAGE1 | 0x04 | 3
    assert (int(bench.tr.discarded), int(bench.tr.pending)) == (20, 0)


def test_a_page_that_is_full_to_its_end_does_not_ask_for_the_next() -> None:
    bench = Bench(virtualized=True, own_buffer=True)
    bench.v.shadow_ptr, bench.v.shadow_limit = bench.start, (bench.start + 4 * PAGE) | 1
    bench.v.pmbptr = bench.v.pmblimitr = 0
    use(bench, "own_buffer.start_own_buffer", 4)
    assert bench.write_records(64) == 64
    bench.edit_stage1(1, lambda d: d & ~1)
    before = int(bench.v.host_ps)
    assert use(bench, "own_buffer.copy_out", 0) == module("machine.own_buffer").COPY_ROOM
    assert int(bench.tr.copied_bytes) == PAGE
    assert int(bench.v.host_ps) - before == 4 * bench.par.walk_read_ps + bench.par.copy_out_page_ps


def test_the_first_stage_2_fault_is_kept_as_the_guest_would_have_seen_it() -> None:
    bench = Bench(virtualized=True)
    assert bench.write_records(70) == 70
    bench.v.host_ps = 12_345
    bench.v.pmbsr = COLL
    for n in (1, 2):
        bench.edit_stage2(bench.buffer_page(n), lambda d: 0)
    bench.v.tlb_page = -1
    bench.m.tlb[0, 0, :, 0] = -1
    assert bench.write_records(1) == 0
    first = int(bench.v.pmbsr), int(bench.v.pmbptr)
    assert first[0] == 0x25 << 26 | S | COLL | 0x07
    assert (int(bench.tr.first_fault_syndrome), int(bench.tr.first_fault_va)) == first
    at = int(bench.tr.first_fault_ps)
    assert 12_345 < at <= int(bench.v.now_ps) + 12_345
    bench.v.pmbsr, bench.v.pmbptr = 0, bench.start + 2 * PAGE
    bench.write_records(1)
    assert bench.tr.stage2_faults == 2
    assert (int(bench.tr.first_fault_ps), int(bench.tr.first_fault_va)) == (at, first[1]), "the first, not the last"


def test_the_log_says_which_guest_page_a_lost_record_was_for() -> None:
    """One more than the page behind a stage 2 fault; 0 where stage 1 is to blame."""
    for edit, page in ((Bench.edit_stage2, 1), (Bench.edit_stage1, 0)):
        bench = Bench(virtualized=True, log_rows=64)
        wanted = bench.buffer_page(0)
        edit(bench, wanted if page else 0, lambda d: d & ~1)
        bench.write_records(1)
        (row,) = [row for row in bench.m.log[0, : int(bench.vm.log_count)] if int(row[2]) & 0xFFFF == LogKind.LOST]
        assert (int(row[3]), int(row[4])) == (bench.start, wanted + 1 if page else 0)


# ---- pins ------------------------------------------------------------------------------------------------------------


def test_a_set_that_is_kept_twice_is_kept_once() -> None:
    bench = Bench(virtualized=True)
    pin(bench, 0, 2)
    for _ in range(2):
        use(bench, "pinning.keep_previous")
        assert int(bench.v.pin_count) == pins(bench) == 2


def test_a_pin_that_is_gone_is_not_given_back() -> None:
    """The source of a migration has no pins any more; what KVM lists of them must not count below nothing."""
    bench = Bench(virtualized=True)
    pin(bench, 0, 3)
    use(bench, "pinning.unpin_previous")
    page = bench.buffer_page(1)
    bench.m.host_page[0, page] &= ~module("machine.hostpage").PIN_MASK
    use(bench, "pinning.unpin_current")
    assert pins(bench) == 0
    word = int(bench.m.host_page[0, page])
    assert word & module("machine.hostpage").PRESENT
    assert word >> 52 == module("machine.hostpage").ROLE_BUFFER << 4, "nothing is borrowed from the bits above"


def test_a_page_that_the_vmm_does_not_have_is_not_mapped_and_not_pinned() -> None:
    """map_fresh answers 1, pin_fresh that there is no page; so do both for a slot whose pages are logged (M1)."""
    pinning = module("machine.pinning")
    for gone, logged in ((True, False), (False, True), (False, False)):
        b = migrating(Handling.NOT_MAPPED)
        b.vm.dirty_logging = int(logged)
        if gone:
            b.call("host.operate_on_page", int(HostOp.MUNMAP), b.buffer_page(2))
        assert walk(b, 0, 4) == 0
        assert use(b, "pinning.map_fresh") == int(gone or logged)
        assert walk(b, 0, 4) == 0
        assert use(b, "pinning.pin_fresh", 0) == (pinning.PIN_NO_PAGE if gone or logged else pinning.PIN_OK)
        assert pins(b) == (0 if gone or logged else 4)


def test_pins_of_vcpus_that_waited_are_counted_over_the_longest_life() -> None:
    """pin_vm's integral goes on to the vCPU that ends last."""
    bench = Bench(virtualized=True, guest={"vcpus": 2})
    other = module("machine.rows").vcpu_row(bench.m, 0, 1)
    bench.par.memlock_pages = 1 << 20
    assert use(bench, "whole_vm.pin_all", 0) == 0
    bench.v.now_ps, bench.v.host_ps, other.now_ps, other.host_ps = 3000, 1000, 9000, 11_000
    use(bench, "whole_vm.unpin_all")
    assert int(bench.vm.pinned_page_ps) == int(bench.par.ram_pages) * 20_000 // 1000
    assert (int(bench.vm.pinned_pages), pins(bench)) == (0, 0)


def test_all_vcpus_wait_while_a_target_starts_up() -> None:
    bench = Bench(virtualized=True, guest={"vcpus": 2})
    other = module("machine.rows").vcpu_row(bench.m, 0, 1)
    bench.vm.migration_begin_ps = 1
    before = int(bench.v.host_ps), int(other.host_ps)
    page = bench.buffer_page(0)
    bench.call("host.operate_on_page", int(HostOp.RECLAIM), page)
    assert use(bench, "whole_vm.map_all") == 0
    cost = int(bench.par.swap_in_ps) + int(bench.par.map_page_ps)
    assert (int(bench.v.host_ps) - before[0], int(other.host_ps) - before[1]) == (cost, cost)
    assert int(bench.vm.migration_downtime_ps) == cost
    assert int(bench.vm.startup_ps) == 0


# ---- events ----------------------------------------------------------------------------------------------------------

EVENTS = {
    Event.STAGE1_ABORT: (0x24 << 26 | 0x07, LostCause.STAGE1_FAULT),
    Event.STAGE2_ABORT: (None, LostCause.REFUSED),  # as the hardware reported it
    Event.EXTERNAL_ABORT: (0x24 << 26 | EA | 0x10, LostCause.REFUSED),
    Event.IMPDEF: (0x1F << 26, LostCause.REFUSED),
    Event.BUFFER_FULL: (0x01, LostCause.REFUSED),
    Event.TOO_LARGE: (0x04, LostCause.REFUSED),
}


@pytest.mark.parametrize("loss", [0, 1])
@pytest.mark.parametrize("was", [0, COLL, 0x25 << 26 | S | 0x07, 0x25 << 26 | S | DL | COLL | 0x0F])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_an_event_is_told_as_the_architecture_would(event: Event, was: int, loss: int) -> None:
    """spe.md 1.8. COLL and DL are kept; S is set; an SPU that had not stopped stops, which is KVM's refusal unless the
    guest's own tables are to blame.
    """
    bench = Bench(virtualized=True)
    v, tr = bench.v, bench.tr
    v.now_ps, v.pmbsr, v.irq_ps, v.walk_status = 5000, was, 1, 0
    v.stop_cause = LostCause.STAGE2_HOST
    host = int(v.host_ps)
    use(bench, "answers.tell_guest", int(event), loss)
    syndrome, cause = EVENTS[event]
    expected = was if syndrome is None else syndrome | was & (COLL | DL)
    expected |= S | (DL if loss else 0)
    assert int(v.guest_pmbsr) == int(v.pmbsr) == expected
    assert (int(v.virq), int(v.event_seen), int(v.answered)) == (1, 1, 2)
    assert v.irq_ps == NEVER
    assert int(tr.forged_loss) == int(loss and not was & DL)
    stopped_now = not was & S
    assert int(tr.refused) == int(stopped_now and event != Event.STAGE1_ABORT)
    assert int(v.stop_cause) == (cause if stopped_now else LostCause.STAGE2_HOST)
    assert int(v.stop_ps) == (5000 if stopped_now else 0)
    assert int(v.host_ps) - host == bench.par.inject_ps
    counters = ("stage1", "stage2", "external", "impdef", "full", "too_large")
    told = [int(getattr(tr, f"injected_{name}")) for name in counters]
    assert told == [int(event == other) for other in EVENTS]


@pytest.mark.parametrize("driver", list(GuestDriver))
@pytest.mark.parametrize("delivery", list(IrqDelivery))
@pytest.mark.parametrize("virtualized", [False, True])
def test_the_interrupt_costs_an_exit_and_the_switch_in_a_vm(
    virtualized: bool, delivery: IrqDelivery, driver: GuestDriver
) -> None:
    """kvm.md 2.5: I4 forces an exit; with I3 KVM looks at the next one; bare metal takes it in the guest. WindowsPerf
    takes none.
    """
    bench = Bench(virtualized=virtualized, trap_pmb=True)
    par, v, tr = bench.par, bench.v, bench.tr
    par.next_exit_only, par.driver = int(delivery), int(driver)
    v.pmbsr, v.irq_ps = S | 1, 77
    before = int(v.host_ps)
    assert bench.call("kvm.take_interrupt", 0) == Hook.NONE
    assert v.irq_ps == NEVER
    assert tr.irqs == 1
    looks = virtualized and delivery == IrqDelivery.FORCED_EXIT
    cost = par.exit_ps + par.spe_switch_ps + par.event_ps + par.inject_ps if looks else 0
    assert int(v.host_ps) - before == int(tr.event_total_ps) == cost
    seen = looks or not virtualized
    assert (int(v.event_seen), int(v.virq)) == (int(seen), int(seen and driver != GuestDriver.WINDOWS))
    assert int(v.guest_pmbsr) == (int(v.pmbsr) if looks else 0)
    if looks:
        assert bench.call("kvm.look_at_event", 0) == Hook.NONE
        assert int(v.host_ps) - before == cost, "an event is taken over once"


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("ec", [0x00, 0x1F, 0x24, 0x25])
def test_a_stage_2_fault_is_the_policys_and_the_rest_the_guests(ec: int, hooked: bool) -> None:
    bench = Bench(virtualized=True, trap_pmb=True, hooks=int(hooked) << Hook.STAGE2_FAULT)
    bench.v.pmbsr, bench.v.event_seen = ec << 26 | S | 7, 0
    asks = hooked and ec == 0x25
    assert bench.call("kvm.look_at_event", 0) == (Hook.STAGE2_FAULT if asks else Hook.NONE)
    assert int(bench.v.virq) == int(not asks)
    assert int(bench.v.guest_pmbsr) == (0 if asks else int(bench.v.pmbsr))


def test_registers_that_trap_cost_an_exit_each() -> None:
    """spe.md 1.11: buffer and sampling registers have a trap each; with SPE taken away all of them trap."""
    for pmb, pms, off in ((False, False, 0), (True, False, 0), (False, True, 0), (True, True, 0), (False, False, 1)):
        bench = Bench(virtualized=True, trap_pmb=pmb, trap_pms=pms)
        v, tr = bench.v, bench.tr
        v.spe_off = off
        before, traps = int(v.host_ps), int(tr.traps)
        bench.call("kvm.access", 0, 3, 5)
        trapped = 3 * (int(bench.par.trap_pmb) or off) + 5 * (int(bench.par.trap_pms) or off)
        assert (bool(bench.par.trap_pmb), bool(bench.par.trap_pms)) == (pmb, pms)
        assert int(tr.traps) - traps == trapped
        assert int(v.host_ps) - before == int(tr.trap_total_ps) == trapped * bench.par.trap_ps


@pytest.mark.parametrize("virtualized", [False, True])
def test_exits_come_in_a_vm_and_where_their_rate_is_not_zero(virtualized: bool) -> None:
    bench = Bench(virtualized=virtualized)
    for exits, preemptions in ((0, 0), (1 << 30, 0), (0, 1 << 30), (1 << 30, 1 << 30)):
        bench.par.exit_interval_ps, bench.par.preempt_interval_ps = exits, preemptions
        bench.v.exit_next_ps = bench.v.preempt_next_ps = -1
        with np.errstate(over="ignore"):
            bench.call("kvm.first_exits", 0)
        for due, mean in ((bench.v.exit_next_ps, exits), (bench.v.preempt_next_ps, preemptions)):
            assert (due < NEVER) == (virtualized and mean != 0)
            assert due > 0


# ---- a migration's target --------------------------------------------------------------------------------------------


def test_m7_prefaulting_costs_a_walk_and_a_mapping_a_page_and_a_table() -> None:
    b = migrating(Handling.PREFAULT_TARGET)
    for name in ("start", "stop", "resume_on_target"):
        step(b, name)
    hostpage = module("machine.hostpage")
    tables = int((b.m.host_page[0] & hostpage.ROLE_MASK >= hostpage.ROLE_TABLE << hostpage.ROLE_SHIFT).sum())
    pages = int(b.v.pmblimitr - b.v.pmbptr + PAGE - 1) // PAGE
    cost = int(step(b, "prefault", 0))
    assert cost == (tables + pages) * b.par.map_page_ps + 4 * pages * b.par.walk_read_ps
    b.v.pmblimitr &= ~1
    assert step(b, "prefault", 0) == 0, "a buffer that is off is not prefaulted"


def test_postcopy_pages_are_in_ram_pages_of_the_target_only() -> None:
    """What is mapped on the target first is what its CPUs walk; a hole stays one and is never fetched."""
    b = migrating(kind=MigrationKind.POSTCOPY)
    b.call("host.operate_on_page", int(HostOp.MUNMAP), 3)
    step(b, "start")
    step(b, "resume_on_target")
    hostpage = module("machine.hostpage")
    assert int(b.m.host_page[0, 3]) & hostpage.HOLE
    assert not b.m.dirty[0, 3]
    mapped = [n for n in range(int(b.par.ram_pages)) if b.stage2_leaf(n) & VALID]
    hot = np.flatnonzero(b.m.host_page[0] & hostpage.ROLE_MASK == hostpage.ROLE_HOT << hostpage.ROLE_SHIFT)
    assert mapped == hot.tolist()
    assert int(b.vm.migration_demanded) == len(hot)


def test_a_migrations_rounds_are_counted_in_pages_sent_again() -> None:
    b = migrating(dirty_bytes_per_us=4096, working_set_pages=10)
    step(b, "start")
    sent = int(b.vm.migration_sent)
    step(b, "end_round")
    again = int(b.vm.migration_pages)
    assert again == 10
    assert (int(b.vm.migration_resent), int(b.vm.migration_sent) - sent) == (again, again)
    assert b.call("migration._next_event_ps") > b.vm.migration_next_ps


def test_each_phase_of_a_migration_has_its_time() -> None:
    b = migrating()
    vm, par = b.vm, b.par
    vm.migration_pages, vm.migration_next_ps = 5, 1000
    page_ps = int(par.migration_page_ps)
    for phase, wait in (
        (0, int(par.migration_retry_ps)), (1, 5 * page_ps), (2, 5 * page_ps + 7 * US), (3, 256 * page_ps), (4, 0),
    ):  # fmt: skip
        vm.migration_phase = phase
        assert step(b, "_next_event_ps") == 1000 + wait
    vm.migration_phase = 5
    assert step(b, "_next_event_ps") == NEVER


# ---- events of the host ----------------------------------------------------------------------------------------------


def test_a_host_that_is_silent_has_no_event_and_bare_metal_has_no_host() -> None:
    ops = ((int(HostOp.AGE), 1000, 1),)
    for kind, virtualized, due in (
        (HostKind.SILENT, True, False), (HostKind.RANDOM, True, True), (HostKind.RANDOM, False, False),
    ):  # fmt: skip
        bench = Bench(virtualized=virtualized, host=Host(kind=kind, random_ops=ops))
        assert (bench.vm.host_next_ps < NEVER) == due
        assert bench.vm.migration_next_ps == NEVER
    moving = Bench(virtualized=True, migration=Migration(kind=MigrationKind.PRECOPY, start_ps=50 * US))
    assert moving.vm.migration_next_ps == 50 * US
