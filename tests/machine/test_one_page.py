"""One page of the VMM's memory: faults of the guest's CPU, pins, blocks, what the judge and KVM note."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spepolicy.hookspecs import Cause
from spepolicy.machine import effects as fx
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.scenario import ABSENT, Bug, Cpu, Host, MigrationKind
from spepolicy.machine.state import Hook
from spepolicy.machine.trace import LogKind

from .interpreted import module
from .spu_bench import PAGE, Bench
from .test_migration import US, migrating, step

VALID, WRITE, AF = 1, 1 << 7, 1 << 10
FRAME = 0xFFFF_FFFF
FOLIO = 512
ONE = np.zeros(1, dtype=np.int64)


def words() -> Any:
    return module("machine.hostpage")


def thp(kernel: Kernel = Kernel.V6_1, **changes: Any) -> Bench:
    """A VM of two huge pages, each a block at stage 2."""
    return Bench(
        virtualized=True, host=Host(backing=Backing.THP, kernel=kernel, **changes), guest={"ram_pages": 2 * FOLIO}
    )


def word(bench: Bench, page: int) -> int:
    return int(bench.m.host_page[0, page])


def level_of(bench: Bench, page: int) -> int:
    return int(module("machine.pagetables").ipa_entry(bench.m, 0, (int(bench.par.ram_page0) + page) << 12)[2])


def frame_at_stage2(bench: Bench, page: int) -> int:
    return (bench.stage2_leaf(page) & 0xFFFF_FFFF_F000) >> 12


# ---- KSM and change_pte ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", list(Kernel))
def test_change_pte_shows_the_new_page_read_only_as_long_as_linux_had_it(kernel: Kernel) -> None:
    """kvm.md H2; change_pte went with Linux 6.10: until then KVM maps the merged page, and the copy that a write makes,
    read-only at once; since then the notifier leaves nothing. A recording's row and a whole operation say the same.
    """
    for name, arguments in (("host.operate_on_page", ()), ("operations.operate", (1,))):
        bench = Bench(virtualized=True, host=Host(kernel=kernel))
        page = bench.buffer_page(1)
        bench.call(name, int(HostOp.KSM), page, *(page + n for n in arguments))
        assert word(bench, page) & words().SHARED
        merged = bench.stage2_leaf(page)
        assert bool(merged & VALID) == (kernel == Kernel.V6_1), name
        if merged & VALID:
            assert frame_at_stage2(bench, page) == words().KSM_FRAME
            assert not merged & WRITE
        bench.call("hostpage.break_sharing", page)
        copied = bench.stage2_leaf(page)
        assert not word(bench, page) & words().SHARED
        assert bool(copied & VALID) == (kernel == Kernel.V6_1), name
        if copied & VALID:
            assert frame_at_stage2(bench, page) == word(bench, page) & FRAME != words().KSM_FRAME
            assert not copied & WRITE
    calls = int(bench.m.host_calls[0, 9])
    assert (calls > 0) == (kernel == Kernel.V6_1)


# ---- faults of the guest's CPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [0, 1])
@pytest.mark.parametrize("by_hardware", [0, 1])
def test_a_stage_2_fault_is_by_its_descriptor_and_its_level(write: int, by_hardware: int) -> None:
    """Arm ARM, fault status codes: 0b0001LL translation, 0b0010LL access flag, 0b0011LL permission; in this order."""
    for edit, kind in (
        (lambda d: 0, 0x04),
        (lambda d: d & ~AF, 0 if by_hardware else 0x08),
        (lambda d: d & ~AF & ~WRITE, (0x0C if write else 0) if by_hardware else 0x08),
        (lambda d: d & ~WRITE, 0x0C if write else 0),
        (lambda d: d, 0),
    ):
        bench = Bench(virtualized=True)
        page = bench.buffer_page(0)
        bench.edit_stage2(page, edit)
        assert bench.call("hostpage.fault_of", page, write, by_hardware) == (kind | 3 if kind else 0)


def test_a_fault_says_the_level_at_which_the_walk_ends() -> None:
    bench = thp()
    assert bench.call("hostpage.fault_of", 600, 1, 1) == 0
    module("machine.pagetables").unmap_ipa(bench.m, 0, (int(bench.par.ram_page0) + 600) << 12)
    assert bench.call("hostpage.fault_of", 600, 0, 1) == 4 + 2, "the block's own entry"


def test_a_write_to_a_shared_page_is_tried_again_after_the_copy() -> None:
    """kvm.md H6: the copy's own notifier bumps the sequence, so KVM asks again; a read maps the shared page at once."""
    for write, tries in ((1, [0, 1]), (0, [1])):
        bench = Bench(virtualized=True, host=Host(kernel=Kernel.V6_12))
        page = bench.buffer_page(0)
        bench.call("host.operate_on_page", int(HostOp.FORK), page)
        bench.edit_stage2(page, lambda d: 0)
        assert word(bench, page) & words().SHARED
        assert [bench.call("hostpage.fault_in", page, write) for _ in tries] == tries
        assert bool(bench.stage2_leaf(page) & WRITE) == bool(write)
    bench.call("host.operate_on_page", int(HostOp.MUNMAP), page)
    assert bench.call("hostpage.fault_in", page, 0) == -1


@pytest.mark.parametrize("write", [0, 1])
def test_the_cpu_marks_what_it_accesses_and_faults_where_it_may_not(write: int) -> None:
    """VTCR_EL2.HA: the access flag comes without a fault. A write to what is read-only takes one, then may write."""
    for edit, faults in (
        (lambda d: d & ~AF, 0), (lambda d: d & ~WRITE, write), (lambda d: 0, 1), (lambda d: d, 0),
    ):  # fmt: skip
        bench = Bench(virtualized=True)
        page = bench.buffer_page(0)
        bench.edit_stage2(page, edit)
        assert bench.call("hostpage.cpu_touch", page, write) == faults
        leaf = bench.stage2_leaf(page)
        assert leaf & (VALID | AF) == VALID | AF
        assert leaf & WRITE or not write


def test_a_page_from_swap_is_read_only_on_6_1_if_it_was_only_read() -> None:
    """Measured (recording swap of kvm_real): 11075 of 11206 maps after a read; on 6.12 none. A write may always."""
    for kernel, write, may in (
        (Kernel.V6_1, 0, False), (Kernel.V6_1, 1, True), (Kernel.V6_12, 0, True), (Kernel.V6_12, 1, True),
    ):  # fmt: skip
        bench = Bench(virtualized=True, host=Host(kernel=kernel))
        page = bench.buffer_page(0)
        bench.call("host.operate_on_page", int(HostOp.RECLAIM), page)
        assert not word(bench, page) & words().PRESENT
        assert bench.call("hostpage.map_page", page, write) == bench.par.swap_in_ps
        assert bool(bench.stage2_leaf(page) & WRITE) == may
        assert bench.call("hostpage.map_page", page, write) == 0, "it is resident now"


def test_a_page_that_postcopy_has_fetched_comes_from_swap_the_next_time() -> None:
    b = migrating(kind=MigrationKind.POSTCOPY)
    assert step(b, "start")
    step(b, "resume_on_target")
    page = b.buffer_page(1)
    assert b.call("host.map_page", page, 1) == 11 * US
    assert not b.m.dirty[0, page] & ABSENT
    b.call("host.operate_on_page", int(HostOp.RECLAIM), page)
    assert b.call("host.map_page", page, 1) == b.par.swap_in_ps
    assert b.vm.migration_demanded == 1 + sum(
        1 for other in range(int(b.par.ram_pages)) if other != page and not b.m.dirty[0, other] & ABSENT
    )


# ---- huge pages ------------------------------------------------------------------------------------------------------


def test_a_write_ends_the_tracking_of_a_whole_huge_page_and_of_no_other() -> None:
    """Soft-dirty tracking of a huge page is one entry of the host's page table."""
    bench = thp()
    bench.m.host_page[0] |= words().TRACKED
    bench.call("hostpage.resident", FOLIO + 5, 1)
    tracked = [bool(word(bench, page) & words().TRACKED) for page in range(2 * FOLIO)]
    assert tracked == [True] * FOLIO + [False] * FOLIO


def test_who_took_a_block_is_noted_for_each_of_its_pages() -> None:
    """A block goes as a whole (kvm_pgtable_stage2_unmap): KVM's handler notes it, and the host is to blame, wherever in
    it the SPU writes next.
    """
    bench = thp(Kernel.V6_12)
    page = bench.buffer_page(0)
    other = page ^ 1
    bench.call("operations.operate", int(HostOp.MPROTECT), other, other + 1)
    first = page & ~(FOLIO - 1)
    for n in range(2 * FOLIO):
        if word(bench, n) & words().ROLE_MASK == words().ROLE_MASK:
            continue  # a table that CPUs walk is back at once
        gone = first <= n < first + FOLIO
        assert bool(word(bench, n) & words().NOTIFIED) == gone
        assert (word(bench, n) & words().GONE_MASK == words().GONE_HOST << words().GONE_SHIFT) == gone
    bench.write_records(1)
    assert bench.tr.stage2_faults == 1
    assert bench.tr.fault_cause == Cause.HOST


def test_a_page_out_of_a_block_while_the_log_is_on_takes_the_block_apart() -> None:
    """KVM maps pages only while it logs: the rest of the block is gone, on account of the migration if there is one."""
    for phase, cause in ((0, "GONE_HOST"), (1, "GONE_MIGRATION")):
        bench = thp()
        bench.vm.dirty_logging, bench.vm.migration_phase = 1, phase
        page = bench.buffer_page(0)
        first = page & ~(FOLIO - 1)
        rest = [n for n in range(first, first + FOLIO) if n != page]
        slots = (page, page ^ 1, page ^ 256)
        for slot, n in enumerate(slots):
            bench.m.tlb[0, 0, slot] = (slot, 0, int(bench.par.ram_page0) + n, 0)
        assert level_of(bench, page) == 2
        bench.call("hostpage.map_page", page, 1)
        assert level_of(bench, page) == 3
        assert bench.stage2_leaf(page) & (VALID | WRITE) == VALID | WRITE
        assert not any(bench.stage2_leaf(n) & VALID for n in rest)
        gone = getattr(words(), cause) << words().GONE_SHIFT
        assert {word(bench, n) & words().GONE_MASK for n in rest} == {gone}
        assert not word(bench, page) & (words().GONE_MASK | words().NOTIFIED)
        assert word(bench, page) & words().DIRTY
        assert not any(word(bench, n) & words().DIRTY for n in rest)
        assert [int(row[0]) for row in bench.m.tlb[0, 0, :3]] == [-1] * 3, "what the SPU had of the block is invalid"


@pytest.mark.parametrize("huge", [False, True])
def test_a_pin_moves_a_page_out_of_zone_movable_and_pays_for_the_copy(huge: bool) -> None:
    """Measured (run movablecore of kvm_real): FOLL_LONGTERM migrates the page first, a huge page whole; once only."""
    bench = thp(zone_movable=True) if huge else Bench(virtualized=True, host=Host(zone_movable=True))
    page = bench.buffer_page(0)
    before = word(bench, page) & FRAME
    count = FOLIO if huge else 1
    first = page & ~(count - 1)
    assert bench.call("hostpage.pin_page", page) == count * bench.par.copy_page_ps
    frames = [word(bench, n) & FRAME for n in range(first, first + count)]
    assert frames == list(range(frames[0], frames[0] + count))
    assert frames[0] % count == 0
    assert before not in frames
    assert frames[0] >= words().NEW_FRAME0
    assert not bench.stage2_leaf(page) & VALID or level_of(bench, page) < 3, "its notifier took it out of stage 2"
    assert bench.call("hostpage.pin_page", page) == 0
    assert (word(bench, page) & words().PIN_MASK) // words().PIN_ONE == 2


@pytest.mark.parametrize("op", [HostOp.PAGEOUT, HostOp.PAGEOUT_PART])
@pytest.mark.parametrize("young", [False, True])
def test_pageout_spares_a_page_that_was_accessed(op: HostOp, young: bool) -> None:
    """Measured on 6.1 (host_effects.tsv, `age!`): MADV_PAGEOUT leaves a young page, and takes it the next time."""
    bench = Bench(virtualized=True, host=Host(kernel=Kernel.V6_1))
    page = bench.buffer_page(0)
    bench.edit_stage2(page, lambda d: d | AF if young else d & ~AF)
    bench.call("operations.operate", int(op), page, page + 1)
    assert bool(word(bench, page) & words().PRESENT) == young
    bench.call("operations.operate", int(op), page, page + 1)
    assert not word(bench, page) & words().PRESENT


# ---- notifiers -------------------------------------------------------------------------------------------------------


def test_a_notifier_passes_over_what_the_vmm_has_unmapped() -> None:
    bench = Bench(virtualized=True, log_rows=64)
    bench.call("host.operate_on_page", int(HostOp.MUNMAP), 7)
    bench.vm.notifier_calls = bench.vm.stage2_unmapped = 0
    bench.call("hostpage.notify", 1, words().WHY_ZAP, 0, 16, 3)
    assert bench.vm.notifier_calls == 15 * 3
    assert bench.vm.stage2_unmapped == 15
    rows = bench.m.log[0, : int(bench.vm.log_count)]
    (row,) = [row for row in rows if row[2] & 0xFFFF == LogKind.UNMAPPED and row[3] >> 32 == 16]
    assert int(row[3]) & FRAME == 0, "first page, and how many above it"
    assert int(row[4]) == 15


def test_a_missed_notifier_leaves_the_entry() -> None:
    """The injected bug (kvm.md 4.5, case 2). The host's page goes, stage 2 still shows it, and the SPU writes to it."""
    bench = Bench(virtualized=True)
    bench.par.bug, bench.par.bug_rate_q16 = int(Bug.MISSED_NOTIFIER), 1 << 16
    page = bench.buffer_page(0)
    old = frame_at_stage2(bench, page)
    bench.call("host.operate_on_page", int(HostOp.DONTNEED), page)
    assert frame_at_stage2(bench, page) == old != word(bench, page) & FRAME
    assert bench.write_records(2) == 2
    bench.par.bug_rate_q16 = 0
    bench.call("hostpage.notify", 1, words().WHY_ZAP, page, page + 1, 1)
    assert not bench.stage2_leaf(page) & VALID


def test_a_tlb_that_is_not_the_page_s_own_is_not_told_of_a_divergence() -> None:
    """Judge: each SPU that holds a translation of the page, once; what it is writing to now counts at once."""
    bench = Bench(virtualized=True, cpu=Cpu(tlb_entries=4), guest={"vcpus": 2})
    page = bench.buffer_page(0)
    ipa = int(bench.par.ram_page0) + page
    frame = word(bench, page) & FRAME
    for k, rows in ((0, [(10, frame, ipa, 0), (11, frame, ipa, 1)]), (1, [(12, frame, ipa + 1, 0), (-1, 0, ipa, 0)])):
        for slot, row in enumerate(rows):
            bench.m.tlb[0, k, slot] = row
    bench.v.tlb_page = 10
    bench.call("hostpage.note_divergence", page)
    assert bench.tr.diverged_pages == 0, "nothing has changed yet"
    bench.m.host_page[0, page] += 1
    bench.call("hostpage.note_divergence", page)
    bench.call("hostpage.note_divergence", page)
    assert bench.m.tlb[0, :, :2, 3].tolist() == [[1, 1], [0, 0]]
    assert bench.m.truth["diverged_pages"][0].tolist() == [1, 0]
    assert bench.tr.diverged_now == 1


def test_a_frame_is_given_once() -> None:
    """Frames of pages and of huge pages never overlap, in any order."""
    bench = Bench(virtualized=True)
    given: list[int] = []
    for n in range(12):
        if n % 3 == 2:
            first = words().fresh_folio(bench.vm)
            assert first % FOLIO == 0
            given += range(first, first + FOLIO)
        else:
            given.append(words().fresh_frame(bench.vm))
    assert len(set(given)) == len(given)


# ---- rows of a recording ---------------------------------------------------------------------------------------------


GOES = fx.SPLIT | fx.MOVE | fx.REPLACE | fx.SHARE | fx.SWAP | fx.LOSE


@pytest.mark.parametrize("op", [op for op in HostOp if op > HostOp.CPU_TOUCH], ids=lambda op: op.name)
def test_a_row_of_a_recording_splits_a_huge_page_unless_it_leaves_the_page_in_place(op: HostOp) -> None:
    """A row names one page: to move one of 512 the host splits the huge page before. What each operation does is
    measured (host_effects.tsv).
    """
    bench = thp()
    page = bench.buffer_page(0)
    assert word(bench, page) & words().HUGE
    bench.call("host.operate_on_page", int(op), page)
    effect = int(fx.effects(Kernel.V6_1, Backing.THP)[1, op, 0, fx.ROW])
    stays = effect & GOES == 0 or effect & fx.UNMAP == 0
    assert bool(word(bench, page) & words().HUGE) == stays
    assert bool(word(bench, page ^ 1) & words().HUGE) == stays
    assert word(bench, (page + FOLIO) % (2 * FOLIO)) & words().HUGE


def test_a_table_that_cpus_walk_is_back_before_the_spu_needs_it() -> None:
    bench = Bench(virtualized=True)
    tables = np.flatnonzero((bench.m.host_page[0] & words().ROLE_MASK) >> words().ROLE_SHIFT == words().ROLE_HOT)
    assert len(tables)
    page = int(tables[0])
    bench.call("host.operate_on_page", int(HostOp.MPROTECT), page)
    assert bench.stage2_leaf(page) & VALID
    buffer = bench.buffer_page(0)
    bench.call("host.operate_on_page", int(HostOp.MPROTECT), buffer)
    assert not bench.stage2_leaf(buffer) & VALID


def test_the_spu_s_fault_on_a_read_only_page_of_kvm_s_own_table_is_told_to_the_policy() -> None:
    """The page that 6.1 maps read-only after a read from swap is a stage 2 permission fault for the SPU."""
    bench = Bench(virtualized=True, hooks=1 << Hook.STAGE2_FAULT)
    page = bench.buffer_page(0)
    bench.call("host.operate_on_page", int(HostOp.RECLAIM), page)
    bench.call("hostpage.map_page", page, 0)
    assert bench.write_records(1) == 0
    assert (bench.syndrome["EC"], bench.syndrome["MSS"]) == (0x25, 0x0F)
    assert int(bench.v.pmbptr) // PAGE == bench.start // PAGE
