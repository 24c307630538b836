"""Live migration step by step, without a clock: the dirty log, the nine handlings of kvm.md 2.3, the empty target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spepolicy.hookspecs import Cause
from spepolicy.machine.hostops import Backing
from spepolicy.machine.scenario import ABSENT, Handling, Host, Migration, MigrationKind, Scenario
from spepolicy.machine.state import NEVER, Hook, LostCause

from .interpreted import Lane, module
from .spu_bench import FIXED, OP_PS, PAGE, Bench, one_kind

VALID, WRITE = 1, 1 << 7
ONE = np.zeros(1, dtype=np.int64)
US = 1_000_000
WAITING, ROUNDS, STOPPED, ARRIVING, CANCELLING, OVER = range(6)


def migrating(
    handling: Handling = Handling.PLAIN, kind: MigrationKind = MigrationKind.PRECOPY, **changes: Any
) -> Bench:
    """An SPU that has written into the first page of its buffer, in a VM that is about to be migrated."""
    values: dict[str, Any] = {
        "start_ps": 50 * US, "bandwidth_bytes_per_us": 4096, "max_downtime_ps": 5 * US, "rounds": 9,
        "switch_ps": 7 * US, "dirty_bytes_per_us": 0, "request_ps": 11 * US,
    }  # fmt: skip
    b = Bench(virtualized=True, trap_pmb=True, trap_pms=True, hooks=1 << Hook.STAGE2_FAULT,
              migration=Migration(kind=kind, handling=handling, **(values | changes)))  # fmt: skip
    b.v.wanted = 1
    assert b.write_records(3) == 3
    b.vm.migration_next_ps = int(b.v.now_ps + b.v.host_ps)
    return b


def step(b: Bench, name: str, *arguments: Any) -> Any:
    return b.call(f"migration.{name}", *arguments)


def pin(b: Bench, first: int, last: int) -> int:
    walking, pinning = module("machine.walking"), module("machine.pinning")
    lo, hi = (np.array([b.start + n * PAGE]) for n in (first, last))
    assert walking.walk_stage1(b.m, ONE, ONE, lo, hi, 0, 0)[0] == 0
    status = int(pinning.pin_fresh(b.m, ONE, ONE, 0)[0])
    pinning.unpin_previous(b.m, ONE, ONE)
    return status


def writable(b: Bench, n: int) -> bool:
    leaf = b.stage2_leaf(b.buffer_page(n))
    return leaf & VALID != 0 and leaf & WRITE != 0


def page_in_log(b: Bench, n: int) -> bool:
    return bool(int(b.m.host_page[0, b.buffer_page(n)]) & module("machine.hostpage").DIRTY)


# ---- the dirty log ---------------------------------------------------------------------------------------------------


def test_the_log_write_protects_everything_and_the_spu_faults_on_its_own_page() -> None:
    """kvm.md 4.4 L1: a permission fault at level 3, EC 0x25, and the judge knows that migration is to blame."""
    b = migrating()
    assert step(b, "start")
    assert not any(b.stage2_leaf(page) & WRITE for page in range(int(b.par.ram_pages)))
    assert b.write_records(1) == 0
    assert (b.syndrome["EC"], b.syndrome["MSS"]) == (0x25, 0x0F)
    assert b.lost() == {int(LostCause.STAGE2_MIGRATION): 1}
    assert b.tr.fault_cause == Cause.MIGRATION


def test_a_block_is_write_protected_as_a_whole_and_the_log_is_to_blame_for_all_of_it() -> None:
    """One mechanism for every log: the pages of a block lose their right to write together."""
    word = module("machine.hostpage")
    b = Bench(virtualized=True, host=Host(backing=Backing.THP), guest={"ram_pages": 1024})
    page = b.buffer_page(0)
    b.call("hostpage.map_page", page, 1)
    first = page & ~(word.FOLIO - 1)
    b.call("dirtylog.protect_page", page, word.GONE_MIGRATION)
    gone = (b.m.host_page[0, first : first + word.FOLIO] & word.GONE_MASK) >> word.GONE_SHIFT
    assert (gone == word.GONE_MIGRATION).all()
    assert b.write_records(1) == 0
    assert b.tr.fault_cause == Cause.MIGRATION


def test_write_protecting_blames_nobody_for_what_was_not_writable() -> None:
    b = migrating()
    page = b.buffer_page(2)
    b.call("pagetables.unmap_ipa", (int(b.par.ram_page0) + page) << 12)
    before = int(b.m.host_page[0, page])
    b.call("dirtylog.write_protect", page, page + 1, 0, module("machine.hostpage").GONE_HOST)
    assert int(b.m.host_page[0, page]) == before


def test_a_page_that_kvm_maps_for_a_write_is_logged_sent_again_and_protected_again() -> None:
    b = migrating()
    step(b, "start")
    page = b.buffer_page(0)
    assert b.call("host.map_page", page, 1) >= 0
    assert page_in_log(b, 0)
    assert writable(b, 0)
    b.v.pmbsr = 0
    assert b.write_records(2) == 2
    sent = int(b.vm.migration_sent)
    step(b, "end_round")
    assert (b.vm.migration_pages, b.vm.migration_resent, b.vm.migration_resent_buffer) == (1, 1, 1)
    assert b.vm.migration_sent == sent + 1
    assert not writable(b, 0)
    assert not page_in_log(b, 0)
    assert b.write_records(1) == 0, "the next round catches the next write"
    assert b.vm.migration_unlogged == 0


def test_a_page_that_is_read_stays_protected_while_the_log_is_on() -> None:
    b = migrating()
    step(b, "start")
    page = b.buffer_page(1)
    b.call("pagetables.unmap_ipa", (int(b.par.ram_page0) + page) << 12)
    assert b.call("host.cpu_touch", page, 0) == 1
    assert b.stage2_leaf(page) & VALID
    assert not writable(b, 1)
    assert b.call("host.cpu_touch", page, 1) == 1
    assert writable(b, 1)
    assert page_in_log(b, 1)


def test_the_cpus_dirty_pages_at_their_rate_up_to_their_working_set() -> None:
    """4096 B/us is a page a us: rounds shrink to what the rate leaves."""
    b = migrating(dirty_bytes_per_us=1024, working_set_pages=40, max_downtime_ps=1)
    step(b, "start")
    rounds = []
    while b.vm.migration_phase == ROUNDS:
        step(b, "end_round")
        rounds.append(int(b.vm.migration_pages))
    assert rounds[:4] == [40, 10, 2, 0], "256 pages take 256 us: 64, of which 40; 40 us: 10; 10 us: 2; 2 us: 0"
    assert b.vm.migration_resent == sum(rounds)


def test_rounds_end_at_the_downtime_that_is_allowed_or_at_their_number() -> None:
    for changes, rounds in (
        ({"max_downtime_ps": 40 * US}, 1),
        ({"max_downtime_ps": 10 * US}, 2),
        ({"max_downtime_ps": 1, "rounds": 3}, 3),
    ):
        b = migrating(dirty_bytes_per_us=1024, working_set_pages=40, **changes)
        step(b, "start")
        while b.vm.migration_phase == ROUNDS:
            step(b, "end_round")
        assert b.vm.migration_round == rounds, changes
        assert b.vm.migration_downtime_ps == b.vm.migration_pages * US + 7 * US


# ---- the target ------------------------------------------------------------------------------------------------------


def test_the_target_begins_with_nothing_mapped_but_what_cpus_walk_and_nothing_pinned() -> None:
    b = migrating()
    assert pin(b, 0, 4) == 0
    for name in ("start", "stop", "resume_on_target"):
        step(b, name)
    host = module("machine.host")
    roles = b.m.host_page[0] >> host.ROLE_SHIFT & 3
    mapped = [page for page in range(int(b.par.ram_pages)) if b.stage2_leaf(page) & VALID]
    assert mapped == np.flatnonzero(roles == host.ROLE_HOT).tolist()
    assert (b.vm.pinned_pages, b.v.pin_count) == (0, 0)
    assert not (b.m.host_page[0] & host.PIN_MASK).any()
    assert (b.vm.migration_phase, b.vm.migration_outcome, b.vm.dirty_logging) == (OVER, 1, 0)
    assert b.write_records(1) == 0
    assert (b.syndrome["EC"], b.syndrome["MSS"] & 0x3C) == (0x25, 0x04), "a translation fault: on the table or the page"
    assert b.tr.fault_cause == Cause.MIGRATION


def test_what_the_source_had_swapped_out_or_shared_is_an_ordinary_page_on_the_target() -> None:
    b = migrating()
    host, hostops = module("machine.host"), module("machine.hostops")
    free = np.flatnonzero(b.m.host_page[0] >> host.ROLE_SHIFT & 3 == 0)[:3]
    for page, op in zip(free, (hostops.HostOp.RECLAIM, hostops.HostOp.KSM, hostops.HostOp.MUNMAP), strict=True):
        b.call("host.operate_on_page", int(op), int(page))
    for name in ("start", "stop", "resume_on_target"):
        step(b, name)
    words = b.m.host_page[0]
    for page in free[:2]:
        assert words[page] & (host.PRESENT | host.SHARED | host.HOLE) == host.PRESENT
    assert words[free[2]] & host.HOLE
    frames = words & host.FRAME
    assert len(np.unique(frames)) == len(frames)


def test_the_registers_come_along_and_the_session_goes_on_where_it_was() -> None:
    b = migrating(Handling.PREFAULT_TARGET)
    before = {
        name: int(getattr(b.v, name)) for name in ("pmbptr", "pmblimitr", "pmscr", "pmsirr", "aux_head", "left_ops")
    }
    for name in ("start", "stop", "resume_on_target"):
        step(b, name)
    assert {name: int(getattr(b.v, name)) for name in before} == before
    assert b.write_records(5) == 5, "M7: buffer and tables were mapped before the vCPU ran"
    assert b.tr.stage2_faults == 0
    plain = migrating()
    for name in ("start", "stop", "resume_on_target"):
        step(plain, name)
    assert b.vm.migration_downtime_ps > plain.vm.migration_downtime_ps


def test_postcopy_pages_come_in_order_or_on_demand() -> None:
    b = migrating(kind=MigrationKind.POSTCOPY)
    assert step(b, "start")
    assert b.vm.migration_phase == STOPPED
    assert b.vm.migration_downtime_ps == 7 * US
    step(b, "resume_on_target")
    assert b.vm.migration_phase == ARRIVING
    page = b.buffer_page(2)
    assert b.m.dirty[0, page] & ABSENT
    demanded = int(b.vm.migration_demanded)
    cost = b.call("host.map_page", page, 1)
    assert cost == 11 * US
    assert b.vm.migration_demanded == demanded + 1
    assert b.call("host.map_page", page, 1) == 0, "it is there now"
    step(b, "pages_arrive")
    assert b.vm.migration_arrived == b.par.ram_pages == 256
    assert not b.m.dirty[0].any()
    assert (b.vm.migration_phase, b.vm.migration_outcome) == (OVER, 1)
    assert b.call("host.map_page", b.buffer_page(3), 1) == 0


# ---- M1 to M9 --------------------------------------------------------------------------------------------------------


def test_m1_nothing_is_pinned_or_mapped_for_spe_in_a_slot_that_logs() -> None:
    b = migrating(Handling.NOT_MAPPED)
    assert pin(b, 0, 4) == 0
    step(b, "start")
    assert pin(b, 0, 4) == module("machine.pinning").PIN_NO_PAGE
    assert b.vm.migration_outcome == 0
    assert pin(migrating(), 0, 4) == 0


@pytest.mark.parametrize("handling", [Handling.REFUSE, Handling.EXIT_ON_ENABLE], ids=lambda h: h.name)
def test_m2_m3_the_log_cannot_be_turned_on_while_spe_is_on(handling: Handling) -> None:
    b = migrating(handling)
    assert not step(b, "start")
    assert (b.vm.migration_refused, b.vm.dirty_logging, b.vm.migration_begin_ps) == (1, 0, 0)
    assert writable(b, 0)
    b.v.pmscr = 0
    assert step(b, "start")
    assert b.vm.dirty_logging == 1


@pytest.mark.parametrize(
    ("handling", "pmblimitr_e", "pmscr", "stopped", "held"),
    [
        (Handling.EXIT_ON_ENABLE, 1, 3, 0, True), (Handling.EXIT_ON_ENABLE, 1, 0, 0, False),
        (Handling.STOP_EXIT, 1, 1, 0, True), (Handling.STOP_EXIT, 1, 0, 0, False), (Handling.STOP_EXIT, 0, 3, 0, False),
        (Handling.STOP_EXIT, 1, 3, 1, False), (Handling.EXIT_WHILE_LOGGING, 1, 0, 0, True),
        (Handling.EXIT_WHILE_LOGGING, 0, 3, 0, False), (Handling.PLAIN, 1, 3, 0, False),
    ],
    ids=str,
)  # fmt: skip
def test_m3_m5_m8_a_vcpu_is_not_entered_with_spe_on(
    handling: Handling, pmblimitr_e: int, pmscr: int, stopped: int, held: bool
) -> None:
    """M3 and M5 ask for a level as well, M8 for the buffer alone; PMBSR_EL1.S=1 means that nothing is on."""
    b = migrating(handling)
    b.v.pmscr = 0
    b.v.pmblimitr = b.limit
    step(b, "start")
    assert b.v.blocked == 0
    b.v.pmblimitr, b.v.pmscr, b.v.pmbsr = b.limit | pmblimitr_e, pmscr, stopped << 17
    b.call("guest.enabled_hooks", 0, False)
    assert bool(b.v.blocked) == held
    assert b.tr.vmm_exits == int(held)
    if held:
        since = int(b.v.blocked_since_ps)
        assert b.call("lane._next_time", 0) == NEVER
        b.vm.migration_next_ps = since + 90 * US
        step(b, "stop")
        step(b, "resume_on_target")
        assert b.v.blocked == 0
        assert b.tr.stalled_ps == 90 * US
        assert b.v.now_ps + b.v.host_ps == since + 90 * US
        assert b.call("lane._next_time", 0) < NEVER


@pytest.mark.parametrize("handling", [Handling.STOP_EXIT, Handling.EXIT_WHILE_LOGGING], ids=lambda h: h.name)
def test_m5_m8_vcpus_that_have_spe_on_are_caught_at_once(handling: Handling) -> None:
    held, given_up = migrating(handling), migrating(handling, abort=True)
    for b in (held, given_up):
        step(b, "start")
        assert b.tr.vmm_exits == 1
    assert (held.v.blocked, held.vm.migration_phase) == (1, ROUNDS)
    assert (given_up.v.blocked, given_up.vm.migration_phase) == (0, CANCELLING)
    step(given_up, "cancel")
    assert (given_up.vm.migration_outcome, given_up.vm.dirty_logging) == (3, 0)


@pytest.mark.parametrize("handling", [Handling.STOP_TRAP, Handling.UNLOCK_RELOCK], ids=lambda h: h.name)
def test_m4_m9_spe_is_off_and_the_guest_does_not_see_it(handling: Handling) -> None:
    """An invisible blackout for the whole migration: the registers read as the guest wrote them, nothing is sampled."""
    b = migrating(handling)
    assert pin(b, 0, 4) == 0
    registers = (int(b.v.pmblimitr), int(b.v.pmscr), int(b.v.pmbsr))
    step(b, "start")
    assert (int(b.v.pmblimitr), int(b.v.pmscr), int(b.v.pmbsr)) == registers
    assert not module("machine.spu").profiling_enabled(b.v)
    assert b.vm.pinned_pages == (0 if handling is Handling.UNLOCK_RELOCK else 4)
    written = int(b.tr.written)
    b.run(int(b.v.now_ps) + 50 * 512 * OP_PS)
    assert b.tr.written == written
    assert b.v.stop_cause == LostCause.MIGRATION
    traps = int(b.tr.traps)
    b.call("kvm.access", 0, 2, 3)
    assert b.tr.traps == traps + 5
    b.vm.migration_next_ps = int(b.v.now_ps + b.v.host_ps)
    step(b, "cancel")
    assert module("machine.spu").profiling_enabled(b.v)


@pytest.mark.parametrize(("handling", "unlogged"), [(Handling.REPORT_DIRTY, 0), (Handling.UNREPORTED, 1)], ids=str)
def test_m6_pinned_pages_stay_writable_and_are_reported_or_the_target_has_old_data(
    handling: Handling, unlogged: int
) -> None:
    """kvm.md 4.4 L2: without M6's report what the SPU wrote is lost, and nobody notices."""
    b = migrating(handling)
    assert pin(b, 0, 2) == 0
    step(b, "start")
    assert [writable(b, n) for n in range(4)] == [True, True, False, False]
    for _ in range(2):
        assert b.write_records(4) == 4
        step(b, "end_round")
    assert b.tr.stage2_faults == 0
    assert b.vm.migration_unlogged == 2 * unlogged
    assert b.vm.migration_resent_buffer == (0 if unlogged else 2 * 2)


def test_m6_a_page_unpinned_in_a_round_is_reported_too() -> None:
    b = migrating(Handling.REPORT_DIRTY)
    assert pin(b, 0, 1) == 0
    step(b, "start")
    assert b.write_records(2) == 2
    assert pin(b, 1, 2) == 0
    step(b, "end_round")
    assert b.vm.migration_unlogged == 0
    assert not writable(b, 0)
    assert writable(b, 1)


def test_cancelling_leaves_pins_and_protection_as_they_are() -> None:
    """kvm.md 4.4 L5: the log goes off; a page is writable again when it faults."""
    b = migrating(cancel_round=1, dirty_bytes_per_us=1024, max_downtime_ps=1)
    assert pin(b, 0, 4) == 0
    step(b, "start")
    step(b, "end_round")
    assert b.vm.migration_phase == CANCELLING
    step(b, "cancel")
    assert (b.vm.migration_outcome, b.vm.pinned_pages) == (2, 4)
    assert not writable(b, 0)
    b.call("host.map_page", b.buffer_page(0), 1)
    assert writable(b, 0)
    assert not page_in_log(b, 0)


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_the_clock_does_the_steps_in_their_time() -> None:
    """start at 50 us, 256 pages at 1 us each, stop with none left, 7 us for the devices."""
    hooks = 1 << Hook.MIGRATION_STARTED | 1 << Hook.MIGRATION_FINISHED
    where = Migration(kind=MigrationKind.PRECOPY, start_ps=50 * US, bandwidth_bytes_per_us=4096, switch_ps=7 * US,
                      dirty_bytes_per_us=0)  # fmt: skip
    bench = Bench(virtualized=True, hooks=hooks, migration=where)
    times, answers = [], []
    while bench.vm.migration_next_ps < NEVER:
        times.append(int(bench.vm.migration_next_ps) // US)
        answers.append(step(bench, "migration_event"))
    assert times == [50, 306, 313]
    assert answers == [Hook.MIGRATION_STARTED, Hook.NONE, Hook.MIGRATION_FINISHED]
    assert (bench.vm.migration_begin_ps, bench.vm.migration_end_ps) == (50 * US, 313 * US)


def test_a_refused_migration_is_tried_again_and_bare_metal_does_not_migrate() -> None:
    b = migrating(Handling.REFUSE, retry_ps=30 * US)
    at = int(b.vm.migration_next_ps)
    assert step(b, "migration_event") == Hook.NONE
    assert (b.vm.migration_phase, b.vm.migration_next_ps) == (WAITING, at + 30 * US)
    metal = Lane(
        Scenario(workload=one_kind(), cpu=FIXED, migration=Migration(kind=MigrationKind.PRECOPY)), virtualized=False
    )
    assert metal.vm.migration_next_ps == NEVER
