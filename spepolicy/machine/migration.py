"""Live migration: pre-copy with a dirty log, stop and copy, a target whose stage 2 is empty, post-copy with demand
faults; and what KVM does with SPE meanwhile (kvm.md 2.3, M1 to M9).

Each thing that happens is one function without a clock in it (`start`, `end_round`, `stop`, `resume_on_target`,
`cancel`, `pages_arrive`, `gate`), so that an explorer can call it where it likes. `migration_event` is the simulation's
clock around them.

What the guest's CPUs write is a rate (its pages have no content here); what the SPU writes is followed page by page.
The target is a host like the source; what the SPU needs of it is the same. KVM_RUN on it begins with stage 2 empty and
nothing pinned.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from spepolicy.arch.registers import PMBLIMITR_E, PMBLIMITR_LIMIT, PMBSR_S, PMSCR_E0SPE, PMSCR_E1SPE
from spepolicy.jit import jit
from spepolicy.machine.dirtylog import (
    KEEP_AND_REPORT,
    KEEP_NONE,
    KEEP_UNREPORTED,
    begin_log,
    collect_dirty,
    end_log,
    is_reported,
)
from spepolicy.machine.hostpage import (
    DIRTY,
    EMPTY,
    GONE_MIGRATION,
    HOLE,
    HUGE,
    LOCKED,
    PIN_MASK,
    PRESENT,
    ROLE_BUFFER,
    ROLE_HOT,
    ROLE_MASK,
    ROLE_SHIFT,
    SHARED,
    SKIPPED,
    cpu_touch,
    invalidate_tlb,
    map_page,
    resident,
    taken,
)
from spepolicy.machine.layout import scatter
from spepolicy.machine.pagetables import unmap_ipa, va_leaf
from spepolicy.machine.rows import dirty, host_page, params, pool, truth_row, vcpu_row, vm_row
from spepolicy.machine.scenario import ABSENT, WROTE, Handling, MigrationKind
from spepolicy.machine.spu import drain, hold_counter
from spepolicy.machine.state import NEVER, Hook, LostCause, Machine, Segment
from spepolicy.machine.trace import MIGRATED, log_vm
from spepolicy.mmu.walker import OA_MASK, VALID

__all__ = [
    "Phase",
    "cancel",
    "end_round",
    "gate",
    "migration_event",
    "pages_arrive",
    "resume_on_target",
    "start",
    "stop",
]


class Phase(IntEnum):
    """Where a migration is: `VM.migration_phase`, and `detail` of a MIGRATED row of the event log."""

    WAITING = 0  # it has not begun, or could not begin
    ROUNDS = 1  # pre-copy: the log is on, pages are being sent
    STOPPED = 2  # the vCPUs stand still: downtime
    ARRIVING = 3  # post-copy: the target runs, pages are being fetched and pushed
    CANCELLING = 4  # the VMM gave up
    OVER = 5


_WAITING, _ROUNDS, _STOPPED, _ARRIVING, _CANCELLING, _OVER = (int(phase) for phase in Phase)
_POSTCOPY = int(MigrationKind.POSTCOPY)
_REFUSE, _EXIT_ON_ENABLE, _STOP_TRAP, _STOP_EXIT = (int(Handling(n)) for n in (2, 3, 4, 5))
_REPORT_DIRTY, _PREFAULT_TARGET, _EXIT_WHILE_LOGGING, _UNLOCK_RELOCK = (int(Handling(n)) for n in (6, 7, 8, 9))
_UNREPORTED = int(Handling.UNREPORTED)
_DONE = int(Segment.DONE)
_NONE, _STARTED, _FINISHED = int(Hook.NONE), int(Hook.MIGRATION_STARTED), int(Hook.MIGRATION_FINISHED)
_CAUSE = int(LostCause.MIGRATION)
COMPLETED, CANCELLED, ABORTED = 1, 2, 3
ARRIVING_PAGES = 256  # pushed in one event


# ---- the dirty log ---------------------------------------------------------------------------------------------------


@jit
def _keep(par: Any) -> int:
    """Return what becomes of pinned pages: M6, and the bug that M6 avoids."""
    if par.migration_handling == _REPORT_DIRTY:
        return KEEP_AND_REPORT
    return KEEP_UNREPORTED if par.migration_handling == _UNREPORTED else KEEP_NONE


@jit
def _begin_log(m: Machine, i: int) -> None:
    """Turn the dirty log on."""
    begin_log(m, i, _keep(params(m, i)), GONE_MIGRATION)
    _forget_writes(m, i)


@jit
def _read_log(m: Machine, i: int) -> int:
    """Read and clear the dirty log; return how many pages were in it."""
    vm = vm_row(m, i)
    par = params(m, i)
    keep = _keep(par)
    words, log = host_page(m, i), dirty(m, i)
    for page in range(par.ram_pages):
        word = words[page]
        if is_reported(word, keep):
            if word & ROLE_MASK == ROLE_BUFFER << ROLE_SHIFT:
                vm.migration_resent_buffer += 1
        elif log[page] & WROTE != 0:
            vm.migration_unlogged += 1
    count = collect_dirty(m, i, 0, par.ram_pages, keep, GONE_MIGRATION)
    _forget_writes(m, i)
    return count


@jit
def _forget_writes(m: Machine, i: int) -> None:
    """For the judge: what the SPU writes to from now on is for the next reading of the log."""
    log = dirty(m, i)
    for page in range(params(m, i).ram_pages):
        log[page] &= ABSENT
    for k in range(params(m, i).vcpus):
        _note_page_in_use(m, i, k)


@jit
def _note_page_in_use(m: Machine, i: int, k: int) -> None:
    """For the judge: the SPU goes on writing to the page in its TLB."""
    v = vcpu_row(m, i, k)
    if v.tlb_page == -1 or v.pmblimitr & PMBLIMITR_E == 0:
        return
    if params(m, i).physical != 0:
        page = v.tlb_page - params(m, i).ram_page0
    else:
        slot, entry, _reads = va_leaf(m, i, v.tlb_page << 12)
        if slot < 0:
            return
        page = ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - params(m, i).ram_page0
    if 0 <= page < params(m, i).ram_pages:
        dirty(m, i)[page] |= WROTE


# ---- SPE and the VMM -------------------------------------------------------------------------------------------------


@jit
def is_on(v: Any, sampling: int) -> bool:
    """Tell whether the vCPU has SPE on: its buffer, and with *sampling* a level too (kvm.md 2.3 M5; M8 asks less)."""
    if v.pmblimitr & PMBLIMITR_E == 0 or v.pmbsr & PMBSR_S != 0 or v.segment == _DONE:
        return False
    return sampling == 0 or v.pmscr & (PMSCR_E0SPE | PMSCR_E1SPE) != 0


@jit
def gate(m: Machine, i: int, k: int) -> None:
    """M3, M5, M8: before the vCPU is entered with SPE on while the log is on, KVM exits to the VMM, which holds the
    vCPU until the migration is over, or gives the migration up.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    v = vcpu_row(m, i, k)
    if v.blocked != 0 or not is_on(v, 0 if vm.migration_gate == _EXIT_WHILE_LOGGING else 1):
        return
    tr = truth_row(m, i, k)
    tr.vmm_exits += 1
    tr.event_total_ps += par.vmm_exit_ps
    drain(m, i, k)
    v.host_ps += par.vmm_exit_ps
    if par.migration_abort != 0:
        vm.migration_phase = _CANCELLING
        vm.migration_gate = 0
        vm.migration_next_ps = v.now_ps + v.host_ps
        return
    v.blocked = 1
    v.blocked_since_ps = v.now_ps + v.host_ps
    vm.blocked += 1


@jit
def _switch_off(m: Machine, i: int) -> None:
    """M4 and M9: every SPE register traps, writes reach KVM's copy only (KVM_ARM_VCPU_SPE_STOP_TRAP)."""
    for k in range(params(m, i).vcpus):
        v = vcpu_row(m, i, k)
        drain(m, i, k)
        hold_counter(v, v.now_ps)
        v.spe_off = max(v.spe_off, 1)
        v.stop_cause = _CAUSE


@jit
def _drop_pins(m: Machine, i: int, now_ps: int) -> None:
    """Nothing is pinned any more: the source is gone, or its slots were unlocked."""
    vm = vm_row(m, i)
    words = host_page(m, i)
    for page in range(words.shape[0]):
        words[page] &= ~(PIN_MASK | SKIPPED)
    elapsed = max(now_ps - vm.pinned_since_ps, 0)
    vm.pinned_page_ps += vm.pinned_pages * (elapsed // 1000)
    vm.pinned_since_ps = max(now_ps, vm.pinned_since_ps)
    vm.pinned_pages = 0
    vm.leaked_pins = 0
    vm.slots_locked = 0
    for k in range(params(m, i).vcpus):
        v = vcpu_row(m, i, k)
        v.pin_count = 0
        v.pin_fresh = 0


@jit
def _set_free(m: Machine, i: int, now_ps: int) -> None:
    """The migration is over for the vCPUs: those that were held run again, SPE is theirs again."""
    vm = vm_row(m, i)
    for k in range(params(m, i).vcpus):
        v = vcpu_row(m, i, k)
        if v.spe_off == 1:
            v.spe_off = 0
        if v.blocked != 0:
            truth_row(m, i, k).stalled_ps += now_ps - v.blocked_since_ps
            v.host_ps = max(v.host_ps, now_ps - v.now_ps)
            v.blocked = 0
    vm.blocked = 0
    vm.migration_gate = 0


# ---- the steps -------------------------------------------------------------------------------------------------------


@jit
def start(m: Machine, i: int) -> bool:
    """Begin: turn the dirty log on and send all pages; post-copy stops the vCPUs at once. Return False if KVM refuses
    because a vCPU has SPE on (M2, M3).
    """
    vm = vm_row(m, i)
    par = params(m, i)
    handling = par.migration_handling
    if handling in (_REFUSE, _EXIT_ON_ENABLE):
        for k in range(par.vcpus):
            if is_on(vcpu_row(m, i, k), 1):
                vm.migration_refused += 1
                return False
    if handling in (_STOP_TRAP, _UNLOCK_RELOCK):
        _switch_off(m, i)
    if handling == _UNLOCK_RELOCK:
        _drop_pins(m, i, vm.migration_next_ps)
    vm.migration_begin_ps = vm.migration_next_ps
    vm.migration_round = 0
    if par.migration_kind == _POSTCOPY:
        vm.migration_pages = 0
        stop(m, i)
        return True
    vm.migration_phase = _ROUNDS
    if handling in (_EXIT_ON_ENABLE, _STOP_EXIT, _EXIT_WHILE_LOGGING):
        # The VMM stops profiling before it turns the log on (M5); in M8 KVM is taken to kick the vCPUs before it
        # write-protects anything, for what they have in flight would fault.
        vm.migration_gate = handling
        for k in range(par.vcpus):
            if vm.migration_phase == _ROUNDS:
                gate(m, i, k)
    if vm.migration_phase == _ROUNDS:
        vm.migration_pages = par.ram_pages
        vm.migration_sent += par.ram_pages
        _begin_log(m, i)
    return True


@jit
def written_by_cpus(m: Machine, i: int, elapsed_ps: int) -> int:
    """Return how many pages the guest's CPUs dirtied in *elapsed_ps*, at the rate that the log's faults leave them."""
    par = params(m, i)
    if par.migration_dirty_page_ps == 0:
        return 0
    return min(elapsed_ps // par.migration_dirty_page_ps, par.migration_working_set)


@jit
def end_round(m: Machine, i: int) -> None:
    """All pages of the round are sent: read and clear the log; go on, or stop if what is left can be sent in time."""
    vm = vm_row(m, i)
    par = params(m, i)
    vm.migration_round += 1
    pages = min(written_by_cpus(m, i, vm.migration_pages * par.migration_page_ps) + _read_log(m, i), par.ram_pages)
    vm.migration_pages = pages
    vm.migration_sent += pages
    vm.migration_resent += pages
    if par.migration_cancel_round != 0 and vm.migration_round >= par.migration_cancel_round:
        vm.migration_phase = _CANCELLING
    elif pages * par.migration_page_ps <= par.migration_max_downtime_ps or vm.migration_round >= par.migration_rounds:
        stop(m, i)


@jit
def stop(m: Machine, i: int) -> None:
    """Stop the vCPUs, drain their SPUs, send what is left and the state of the devices: the downtime begins."""
    vm = vm_row(m, i)
    par = params(m, i)
    downtime = vm.migration_pages * par.migration_page_ps + par.migration_switch_ps
    for k in range(par.vcpus):
        v = vcpu_row(m, i, k)
        if v.segment == _DONE:
            continue
        drain(m, i, k)
        if v.blocked == 0:
            v.host_ps += downtime
    vm.migration_downtime_ps += downtime
    vm.migration_phase = _STOPPED


@jit
def _empty_target(m: Machine, i: int) -> None:
    """The target's KVM has mapped nothing. What the source had swapped out or shared has a page of its own here; in
    post-copy no page has come yet.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    words, log = host_page(m, i), dirty(m, i)
    for page in range(par.ram_pages):
        if words[page] & (HOLE | EMPTY) == 0 and words[page] & (PRESENT | SHARED) != PRESENT:
            resident(m, i, page, 1)
    for page in range(par.ram_pages):
        unmap_ipa(m, i, (par.ram_page0 + page) << 12)
        words[page] = taken(words[page] & ~(LOCKED | DIRTY), GONE_MIGRATION)
        log[page] = 0
        if par.migration_kind == _POSTCOPY and words[page] & (HOLE | EMPTY) == 0:
            words[page] &= ~(PRESENT | HUGE)  # userfaultfd fills page by page
            log[page] = ABSENT
    vm.locked_pages = 0
    invalidate_tlb(m, i, par.ram_page0, par.ram_page0 + par.ram_pages)
    vm.migration_arrived = 0
    for page in range(par.ram_pages):
        if words[page] & ROLE_MASK == ROLE_HOT << ROLE_SHIFT:
            cpu_touch(m, i, page, 0)  # a CPU's first walk faults it in


@jit
def prefault(m: Machine, i: int, k: int) -> int:
    """M7: map the buffer that is enabled, and the tables that reach it, before the vCPU runs. Return the cost in ps."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    if v.pmblimitr & PMBLIMITR_E == 0:
        return 0
    cost = 0
    for table in range(par.guest_tables):
        cost += _map_if_table(m, i, table)
    for n in range(v.pmbptr >> 12, (v.pmblimitr & PMBLIMITR_LIMIT) >> 12):
        page = n - par.ram_page0
        if par.physical == 0:
            slot, entry, reads = va_leaf(m, i, n << 12)
            cost += reads * par.walk_read_ps
            if slot < 0 or pool(m, i)[slot, entry] & VALID == 0:
                continue
            page = ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - par.ram_page0
        if 0 <= page < par.ram_pages:
            cost += max(map_page(m, i, page, 1), 0) + par.map_page_ps
    return cost


@jit
def _map_if_table(m: Machine, i: int, index: int) -> int:
    """Map the guest's stage 1 table that was the *index*-th to be made."""
    par = params(m, i)
    page = scatter(par, index)
    if host_page(m, i)[page] & ROLE_MASK == 0:
        return 0
    return max(map_page(m, i, page, 1), 0) + par.map_page_ps


@jit
def resume_on_target(m: Machine, i: int) -> None:
    """The vCPUs' state is on the target, where stage 2 is empty and nothing is pinned; they run again."""
    vm = vm_row(m, i)
    par = params(m, i)
    now_ps = vm.migration_next_ps
    end_log(m, i)
    _drop_pins(m, i, now_ps)
    _empty_target(m, i)
    if par.migration_handling == _PREFAULT_TARGET:
        cost = 0
        for k in range(par.vcpus):
            cost += prefault(m, i, k)
        for k in range(par.vcpus):
            v = vcpu_row(m, i, k)
            if v.segment != _DONE and v.blocked == 0:
                v.host_ps += cost
        vm.migration_downtime_ps += cost
        now_ps += cost
    if par.migration_kind == _POSTCOPY:
        vm.migration_phase = _ARRIVING
        return
    _set_free(m, i, now_ps)
    _finish(vm, COMPLETED, now_ps)


@jit
def pages_arrive(m: Machine, i: int) -> None:
    """Post-copy: the source has pushed the next pages."""
    vm = vm_row(m, i)
    par = params(m, i)
    words, log = host_page(m, i), dirty(m, i)
    last = min(vm.migration_arrived + ARRIVING_PAGES, par.ram_pages)
    for page in range(vm.migration_arrived, last):
        if log[page] & ABSENT != 0:
            log[page] = 0
            words[page] |= PRESENT
    vm.migration_sent += last - vm.migration_arrived
    vm.migration_arrived = last
    if last == par.ram_pages:
        _set_free(m, i, vm.migration_next_ps)
        _finish(vm, COMPLETED, vm.migration_next_ps)


@jit
def cancel(m: Machine, i: int) -> None:
    """The VMM gives up: the log goes off, the guest goes on here. What is write-protected stays so until it faults."""
    vm = vm_row(m, i)
    end_log(m, i)
    _set_free(m, i, vm.migration_next_ps)
    _finish(vm, ABORTED if params(m, i).migration_abort != 0 else CANCELLED, vm.migration_next_ps)


@jit
def _finish(vm: Any, outcome: int, now_ps: int) -> None:
    vm.migration_phase = _OVER
    vm.migration_outcome = outcome
    vm.migration_end_ps = now_ps


# ---- the clock -------------------------------------------------------------------------------------------------------


@jit
def _next_event_ps(m: Machine, i: int) -> int:
    vm = vm_row(m, i)
    par = params(m, i)
    phase = vm.migration_phase
    if phase == _WAITING:
        return vm.migration_next_ps + par.migration_retry_ps
    if phase == _ROUNDS:
        return vm.migration_next_ps + max(vm.migration_pages * par.migration_page_ps, 1)
    if phase == _STOPPED:
        return vm.migration_next_ps + vm.migration_pages * par.migration_page_ps + par.migration_switch_ps
    if phase == _ARRIVING:
        return vm.migration_next_ps + ARRIVING_PAGES * par.migration_page_ps
    return vm.migration_next_ps if phase == _CANCELLING else NEVER


@jit
def migration_event(m: Machine, i: int) -> int:
    """Do what is due at `VM.migration_next_ps`, to which all vCPUs have been brought up. Return the hook to call, or
    NONE.
    """
    vm = vm_row(m, i)
    hooks = params(m, i).hooks
    phase = vm.migration_phase
    if phase == _WAITING:
        started = start(m, i)
        hook = _STARTED if started else _NONE
    elif phase == _ROUNDS:
        end_round(m, i)
        hook = _NONE
    elif phase == _STOPPED:
        resume_on_target(m, i)
        hook = _FINISHED
    elif phase == _ARRIVING:
        pages_arrive(m, i)
        hook = _NONE
    else:
        cancel(m, i)
        hook = _FINISHED
    log_vm(m, i, vm.migration_next_ps, MIGRATED, vm.migration_phase, vm.migration_pages, vm.migration_round)
    vm.migration_next_ps = _next_event_ps(m, i)
    return hook if (hooks >> hook) & 1 != 0 else _NONE
