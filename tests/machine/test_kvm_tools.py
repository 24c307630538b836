"""KVM's tools one at a time, interpreted: its own buffer, all of a VM's memory, answers other than an event, timers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spepolicy.hookspecs import Failure
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.state import NEVER, LostCause, Segment

from .interpreted import module
from .spu_bench import OP_PS, PAGE, Bench

ONE = np.zeros(1, dtype=np.int64)
RAM = 256
HELD = 0xFFF << 40  # pins in the word of a page
NO_ROOM, UNMAPPED, NO_PAGE = 1, 2, 3  # answers of copy_out; 0: room


def use(bench: Bench, tool: str, *arguments: Any) -> Any:
    """Use `MODULE.TOOL` on the one vCPU of *bench*, or on its VM."""
    where, _, name = tool.partition(".")
    lanes = (ONE,) if where == "whole_vm" else (ONE, ONE)
    with np.errstate(over="ignore"):
        found = getattr(module(f"machine.{where}"), name)(bench.m, *lanes, *arguments)
    return None if found is None else int(found[0])


# ---- KVM's own buffer ------------------------------------------------------------------------------------------------


def owned(first: int = 0, pages: int = 4, own: int = 4) -> Bench:
    """A vCPU whose guest has enabled *pages* of its buffer from byte *first* on, and KVM a buffer of *own* pages."""
    bench = Bench(virtualized=True, own_buffer=True)
    bench.v.shadow_ptr = bench.start + first
    bench.v.shadow_limit = (bench.start + pages * PAGE) | 1
    bench.v.pmbptr = bench.v.pmblimitr = 0
    use(bench, "own_buffer.start_own_buffer", own)
    return bench


@pytest.mark.parametrize(
    ("first", "pages", "own", "room"), [(0, 4, 4, 4), (0, 4, 2, 2), (0x140, 4, 8, 4), (0x1140, 4, 8, 3)]
)
def test_kvms_buffer_has_the_room_of_the_guests_or_less(first: int, pages: int, own: int, room: int) -> None:
    bench = owned(first, pages, own)
    at = int(bench.v.pmbptr)
    assert at & 0xFFF == first & 0xFFF, "bytes keep their place in a page"
    assert int(bench.v.own_from) == at
    assert int(bench.v.pmblimitr) & 1
    assert (int(bench.v.pmblimitr) & ~0xFFF) - (at & ~0xFFF) == room * PAGE
    assert int(bench.vm.own_pages) == room
    assert bench.v.irq_ps == NEVER


def test_starting_it_keeps_a_collision_and_forgets_the_event() -> None:
    bench = owned()
    bench.v.pmbsr = 0x25 << 26 | 1 << 17 | 1 << 16 | 1
    bench.v.event_seen = 1
    use(bench, "own_buffer.start_own_buffer", 4)
    assert int(bench.v.pmbsr) == 1 << 16
    assert (int(bench.v.event_seen), int(bench.v.answered)) == (0, 1)


def test_what_is_in_it_is_copied_to_where_the_guest_has_its_pointer() -> None:
    """Cost: a walk a table, then the bytes a page; KVM's buffer is off, and the guest's pointer behind the records."""
    bench = owned(0x140)
    written = bench.write_records(100)
    before = int(bench.v.host_ps)
    assert use(bench, "own_buffer.copy_out", 0) == 0
    assert int(bench.v.shadow_ptr) == bench.start + 0x140 + 64 * written
    assert (int(bench.tr.copies), int(bench.tr.copied_bytes)) == (1, 64 * written)
    assert int(bench.v.pmblimitr) == 0
    par = bench.par
    bytes_of = [PAGE - 0x140, 64 * written - (PAGE - 0x140)]
    reads = [4, 1]  # the first page is reached through four descriptors, the next by the table that is at hand
    cost = sum(n * par.copy_out_page_ps >> 12 for n in bytes_of) + sum(reads) * par.walk_read_ps
    assert int(bench.v.host_ps) - before == int(bench.tr.copy_ps) == cost
    assert use(bench, "own_buffer.copy_out", 0) == 0, "and nothing is copied twice"
    assert int(bench.tr.copied_bytes) == 64 * written


def test_a_full_buffer_is_told_by_the_room_that_the_guests_has() -> None:
    bench = owned(0, 1, 4)
    assert bench.write_records(64) == 64
    assert use(bench, "own_buffer.copy_out", 0) == NO_ROOM
    assert int(bench.v.shadow_ptr) == bench.start + PAGE
    assert int(bench.tr.pending) == 64, "they are in the guest's buffer"


def test_a_guest_that_moved_its_pointer_meanwhile_gets_nothing() -> None:
    bench = owned()
    bench.write_records(80)
    bench.v.shadow_limit = (bench.start + PAGE) | 1
    assert use(bench, "own_buffer.copy_out", 0) == NO_ROOM
    assert (int(bench.tr.pending), int(bench.tr.discarded), int(bench.tr.copies)) == (0, 80, 0)
    assert int(bench.v.shadow_ptr) == bench.start


@pytest.mark.parametrize(("edit", "fsc"), [(lambda d: d & ~1, 7), (lambda d: d | 1 << 7, 0xF)])
def test_a_page_that_the_guest_has_unmapped_loses_what_was_written(edit: Any, fsc: int) -> None:
    bench = owned()
    bench.write_records(80)
    bench.edit_stage1(1, edit)
    assert use(bench, "own_buffer.copy_out", 0) == UNMAPPED
    assert int(bench.v.walk_status) & 0x3F == fsc
    assert (int(bench.tr.pending), int(bench.tr.discarded)) == (0, 80)


def test_a_page_that_the_vmm_has_lost_loses_what_was_written() -> None:
    bench = owned()
    bench.write_records(10)
    bench.call("host.operate_on_page", int(HostOp.MUNMAP), bench.buffer_page(0))
    assert use(bench, "own_buffer.copy_out", 0) == NO_PAGE
    assert int(bench.tr.discarded) == 10


def test_a_deferred_copy_takes_the_pages_away_and_pays_when_the_guest_reads() -> None:
    bench = owned()
    bench.write_records(80)
    pages = [bench.buffer_page(n) for n in range(2)]
    before = int(bench.v.host_ps)
    assert use(bench, "own_buffer.copy_out", 1) == 0
    par = bench.par
    assert int(bench.v.host_ps) - before == 5 * par.walk_read_ps + 2 * par.map_page_ps
    assert int(bench.tr.copied_bytes) == 0
    for page in pages:
        assert bench.stage2_leaf(page) & 1 == 0
    at, copied = int(bench.v.host_ps), int(bench.tr.copy_ps)
    for page in (*pages, pages[0]):  # a page is copied once
        bench.call("linux_spe._copy_deferred", 0, page)
    cost = 2 * (par.cpu_fault_ps + par.copy_out_page_ps + par.map_page_ps)
    assert int(bench.v.host_ps) - at == int(bench.tr.copy_ps) - copied == cost
    assert (int(bench.tr.deferred_copies), int(bench.tr.copied_bytes)) == (2, 2 * PAGE)


# ---- all of a VM's memory --------------------------------------------------------------------------------------------


def pins(bench: Bench) -> int:
    return int(((bench.m.host_page[0] & HELD) >> 40).sum())


def test_pinning_all_pins_every_page_once_at_start_up() -> None:
    bench = Bench(virtualized=True)
    bench.par.memlock_pages = RAM
    assert use(bench, "whole_vm.pin_all", 0) == 0
    assert (pins(bench), int(bench.vm.pinned_pages), int(bench.vm.slots_locked)) == (RAM, RAM, 1)
    assert int(bench.vm.startup_ps) >= RAM * bench.par.pin_page_ps
    assert all(bench.stage2_leaf(page) & 0x81 == 0x81 for page in range(RAM))
    use(bench, "whole_vm.unpin_all")
    assert (pins(bench), int(bench.vm.pinned_pages), int(bench.vm.slots_locked)) == (0, 0, 0)


@pytest.mark.parametrize("tool", ["pin_all", "mlock_all"])
def test_all_of_memory_counts_against_the_limit(tool: str) -> None:
    bench = Bench(virtualized=True)
    bench.par.memlock_pages = RAM - 1
    assert use(bench, f"whole_vm.{tool}", 0) == 1
    assert (pins(bench), int(bench.vm.pin_refused), int(bench.vm.locked_pages)) == (0, RAM, 0)
    assert use(bench, f"whole_vm.{tool}", 1) == 0, "the VMM has raised it"
    assert int(bench.vm.pinned_pages) + int(bench.vm.locked_pages) == RAM


@pytest.mark.parametrize("tool", ["pin_all", "mlock_all", "map_all"])
def test_memory_with_a_hole_cannot_be_had_whole(tool: str) -> None:
    bench = Bench(virtualized=True)
    bench.par.memlock_pages = RAM
    bench.call("host.operate_on_page", int(HostOp.MUNMAP), bench.buffer_page(0))
    assert use(bench, f"whole_vm.{tool}", *([] if tool == "map_all" else [0])) == 2
    assert int(bench.vm.slots_locked) == 0


def test_locked_memory_is_resident_and_not_mapped() -> None:
    bench = Bench(virtualized=True)
    bench.par.memlock_pages = RAM
    page = bench.buffer_page(0)
    bench.call("host.operate_on_page", int(HostOp.RECLAIM), page)
    assert use(bench, "whole_vm.mlock_all", 0) == 0
    words = bench.m.host_page[0]
    host = module("machine.host")
    assert all(words & host.LOCKED != 0)
    assert words[page] & host.PRESENT
    assert int(bench.vm.startup_ps) == bench.par.swap_in_ps
    assert bench.stage2_leaf(page) & 1 == 0
    assert use(bench, "whole_vm.map_all") == 0
    assert bench.stage2_leaf(page) & 0x81 == 0x81
    assert pins(bench) == 0


def test_while_it_migrates_the_vm_waits_instead_of_starting_up() -> None:
    bench = Bench(virtualized=True)
    bench.par.memlock_pages = RAM
    bench.vm.migration_begin_ps = 1
    before = int(bench.v.host_ps)
    assert use(bench, "whole_vm.pin_all", 0) == 0
    assert int(bench.vm.startup_ps) == 0
    assert int(bench.v.host_ps) - before == int(bench.vm.migration_downtime_ps) >= RAM * bench.par.pin_page_ps


# ---- answers ---------------------------------------------------------------------------------------------------------


def faulted() -> Bench:
    """A vCPU whose SPU has stopped at a stage 2 fault, with ten records before it and one in flight."""
    bench = Bench(virtualized=True)
    bench.write_records(10)
    bench.v.pmbsr = 0x25 << 26 | 1 << 17 | 1 << 16 | 7
    bench.v.stop_cause, bench.v.flight, bench.v.irq_ps = int(LostCause.STAGE2_HOST), 1, 0
    bench.v.guest_pmbsr = 5
    return bench


@pytest.mark.parametrize("failure", [Failure.SERROR, Failure.RUN_ERROR, Failure.HOST_PANIC])
def test_an_answer_that_ends_the_vm_loses_what_was_not_read(failure: Failure) -> None:
    bench = faulted()
    use(bench, "answers.answer", int(failure))
    assert int(bench.vm.died) == int(failure)
    assert int(bench.v.segment) == int(Segment.DONE)
    assert bench.lost() == {int(LostCause.STAGE2_HOST): 1}
    assert (int(bench.tr.discarded), int(bench.tr.pending), int(bench.v.flight)) == (10, 0, 0)
    assert int(bench.tr.answered_otherwise) == 1


@pytest.mark.parametrize(
    ("failure", "syndrome", "off", "reported"),
    [(Failure.DISABLE, 1 << 16, 2, 0), (Failure.COLLISION, 1 << 16, 0, 0), (Failure.SIDEBAND, 1 << 16, 0, 1)],
)
def test_an_answer_after_which_the_guest_goes_on(failure: Failure, syndrome: int, off: int, reported: int) -> None:
    bench = faulted()
    use(bench, "answers.answer", int(failure))
    v = bench.v
    assert (int(v.pmbsr), int(v.guest_pmbsr), int(v.virq), int(v.spe_off)) == (syndrome, 0, 0, off)
    assert (int(v.reported), int(v.event_seen), int(v.answered)) == (reported, 0, 1)
    assert v.irq_ps == NEVER
    assert int(bench.vm.died) == 0


def test_a_collision_is_told_where_there_was_none() -> None:
    bench = faulted()
    bench.v.pmbsr = 0x25 << 26 | 1 << 17 | 7
    use(bench, "answers.answer", int(Failure.COLLISION))
    assert int(bench.v.pmbsr) == 1 << 16


@pytest.mark.parametrize(("driver", "interrupts"), [(0, 1), (1, 1), (2, 0)])
def test_an_ignored_event_reaches_the_guest_as_the_hardware_has_it(driver: int, interrupts: int) -> None:
    bench = faulted()
    bench.par.driver = driver
    was = int(bench.v.pmbsr)
    use(bench, "answers.answer", int(Failure.IGNORE))
    assert (int(bench.v.guest_pmbsr), int(bench.v.pmbsr)) == (was, was)
    assert (int(bench.v.virq), int(bench.v.event_seen)) == (interrupts, 1)
    assert bench.v.irq_ps == NEVER


# ---- sets of pins, timers --------------------------------------------------------------------------------------------


def pin(bench: Bench, first: int, last: int) -> None:
    lo, hi = (np.array([bench.start + n * PAGE]) for n in (first, last))
    assert use(bench, "walking.walk_stage1", lo, hi, 0, 0) == 0
    assert use(bench, "pinning.pin_fresh", 0) == 0


def test_a_kept_set_grows_and_its_range_holds_both() -> None:
    bench = Bench(virtualized=True)
    pin(bench, 2, 4)
    use(bench, "pinning.keep_previous")
    assert (int(bench.v.pin_lo), int(bench.v.pin_hi)) == (bench.start + 2 * PAGE, bench.start + 4 * PAGE)
    pin(bench, 0, 1)
    use(bench, "pinning.keep_previous")
    assert (int(bench.v.pin_lo), int(bench.v.pin_hi)) == (bench.start, bench.start + 4 * PAGE)
    listed = bench.m.pins[0, 0, int(bench.v.pin_list), : int(bench.v.pin_count)].tolist()
    assert listed == [bench.buffer_page(n) for n in (2, 3, 0)]
    assert pins(bench) == int(bench.vm.pinned_pages) == 3
    use(bench, "pinning.unpin_current")
    assert (pins(bench), int(bench.v.pin_count)) == (0, 0)


def test_a_full_list_gives_up_the_set_before() -> None:
    bench = Bench(virtualized=True)
    bench.par.memlock_pages = 1000
    rooms = bench.m.pins.shape[3]
    held = 0
    while held + 4 <= rooms:
        pin(bench, 0, 4)
        use(bench, "pinning.keep_previous")
        held += 4
        assert int(bench.v.pin_count) == held
    pin(bench, 0, 4)
    use(bench, "pinning.keep_previous")
    assert int(bench.v.pin_count) == pins(bench) == int(bench.vm.pinned_pages) == 4


@pytest.mark.parametrize("enabled", [0, 1])
def test_idle_sets_are_those_of_other_vcpus_with_a_disabled_buffer(enabled: int) -> None:
    """The vCPU that asked pays."""
    bench = Bench(virtualized=True, guest={"vcpus": 2})
    other = module("machine.rows").vcpu_row(bench.m, 0, 1)
    second = np.ones(1, dtype=np.int64)
    walking, pinning = module("machine.walking"), module("machine.pinning")
    lo = np.array([int(other.buffer_va)])
    walking.walk_stage1(bench.m, ONE, second, lo, lo + 2 * PAGE, 0, 0)
    pinning.pin_fresh(bench.m, ONE, second, 0)
    pinning.unpin_previous(bench.m, ONE, second)
    pin(bench, 0, 1)
    use(bench, "pinning.unpin_previous")
    other.pmblimitr = int(other.buffer_va) + 4 * PAGE | enabled
    mine, others = int(bench.v.host_ps), int(other.host_ps)
    assert use(bench, "pinning.release_idle") == (0 if enabled else 2)
    assert int(other.pin_count) == (2 if enabled else 0)
    assert int(bench.v.pin_count) == 1
    assert int(bench.v.host_ps) - mine == (0 if enabled else 2 * bench.par.unpin_page_ps)
    assert int(other.host_ps) == others


def test_a_timer_is_due_after_host_time_and_can_be_taken_back() -> None:
    bench = Bench(virtualized=True)
    bench.v.now_ps, bench.v.host_ps = 7 * OP_PS, 1000
    use(bench, "answers.set_timer", np.array([50]))
    assert int(bench.v.timer_ps) == 7 * OP_PS + 1050
    use(bench, "answers.set_timer", np.array([0]))
    assert int(bench.v.timer_ps) == 7 * OP_PS + 1000
    use(bench, "answers.set_timer", np.array([-1]))
    assert bench.v.timer_ps == NEVER


def test_an_exit_to_the_vmm_costs_one() -> None:
    bench = Bench(virtualized=True)
    use(bench, "answers.exit_to_vmm")
    assert int(bench.v.host_ps) == int(bench.tr.hook_total_ps) == int(bench.par.vmm_exit_ps)


def test_looking_finds_the_first_page_on_the_way_that_stage_2_does_not_have() -> None:
    missing, table, listed, notified, in_range = (
        getattr(module("machine.walking"), f"LOOK_{name}")
        for name in ("MISSING", "TABLE", "LISTED", "NOTIFIED", "IN_RANGE")
    )
    bench = Bench(virtualized=True)
    before = int(bench.v.host_ps)
    assert use(bench, "walking.look") == 0
    assert int(bench.v.host_ps) - before == 4 * bench.par.walk_read_ps
    pin(bench, 0, 2)
    use(bench, "pinning.unpin_previous")
    assert use(bench, "walking.look") == in_range
    bench.call("host.operate_on_page", int(HostOp.NUMA_SCAN), bench.buffer_page(0))
    assert use(bench, "walking.look") == in_range | missing | listed | notified
    use(bench, "pinning.unpin_current")
    assert use(bench, "walking.look") == missing | notified
    bench.v.pmbptr = bench.start + 3 * PAGE
    assert use(bench, "walking.look") == 0
    for page in np.flatnonzero(bench.m.host_page[0] >> 57 == 1).tolist():  # the table that only the buffer uses
        bench.call("host.operate_on_page", int(HostOp.NUMA_SCAN), page)
    assert use(bench, "walking.look") == missing | table | notified
