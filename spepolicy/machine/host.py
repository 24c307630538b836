"""The host's memory management as events in a lane's time: a recording, or operations at random times.

A random operation is played whole (`spepolicy.machine.operations`). A row of a recording is one call that was seen on a
real host: the notifier calls of an operation are rows of their own there, so a row does what that one call does, and
what the operation did to the page it named. Both obey the table of measured effects (`spepolicy.machine.effects`). Its
main message: FOLL_PIN keeps the *page*, not KVM's stage 2 mapping, because MMU notifiers fire by range before anybody
looks at the pin count.
"""

from __future__ import annotations

import numpy as np

from spepolicy.jit import jit, widen
from spepolicy.machine.dirtylog import protect_page
from spepolicy.machine.draw import draw, scaled_exponential
from spepolicy.machine.effects import (
    AGE,
    COLLAPSE,
    COPY_ON_WRITE,
    LOSE,
    MOVE,
    READ_ONLY,
    REPLACE,
    ROW,
    SHARE,
    SPLIT,
    SWAP,
    UNMAP,
    WRITE_PROTECT,
    effects,
)
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.hostpage import (
    DEFERRED,
    DIRTY,
    EMPTY,
    FRAME,
    GONE_BUG,
    GONE_GUEST,
    GONE_HOST,
    GONE_MASK,
    GONE_MIGRATION,
    GONE_NEVER,
    GONE_SHIFT,
    HOLE,
    HUGE,
    KSM_FRAME,
    LOCKED,
    NEW_FRAME0,
    NOTIFIED,
    PIN_MASK,
    PIN_ONE,
    PRESENT,
    RAM_FRAME0,
    ROLE_BUFFER,
    ROLE_HOT,
    ROLE_MASK,
    ROLE_OTHER,
    ROLE_SHIFT,
    ROLE_TABLE,
    SHARED,
    SKIPPED,
    age,
    bug_strikes,
    cpu_touch,
    has_diverged,
    invalidate_tlb,
    map_page,
    note_divergence,
    notify,
    resident,
    split_folio,
)
from spepolicy.machine.operations import change_backing, exempt, operate, why_of
from spepolicy.machine.pagetables import ipa_leaf, map_ipa
from spepolicy.machine.rows import (
    effect_table,
    exponential,
    host_ops,
    host_page,
    params,
    random_op,
    rec_end,
    rec_first,
    rec_op,
    rec_ps,
    vm_row,
)
from spepolicy.machine.state import NEVER, Machine
from spepolicy.machine.trace import HOST_OP, log_host

__all__ = [
    "AGE", "COPY_ON_WRITE", "DEFERRED", "DIRTY", "EFFECT", "EMPTY", "FRAME", "GONE_BUG", "GONE_GUEST", "GONE_HOST",
    "GONE_MASK", "GONE_MIGRATION", "GONE_NEVER", "GONE_SHIFT", "HOLE", "HUGE", "LOCKED", "LOSE", "MOVE", "NEW_FRAME0",
    "NOTIFIED", "PIN_MASK", "PIN_ONE", "PRESENT", "RAM_FRAME0", "REPLACE", "ROLE_BUFFER", "ROLE_HOT", "ROLE_MASK",
    "ROLE_OTHER", "ROLE_SHIFT", "ROLE_TABLE", "SHARE", "SHARED", "SKIPPED", "SWAP", "UNMAP", "WRITE_PROTECT",
    "bug_strikes", "cpu_touch", "has_diverged", "host_event", "invalidate_tlb", "is_out_of_reach", "map_page",
    "operate_on_page", "resident", "schedule_host",
]  # fmt: skip

# [HostOp, unpinned | pinned | mlocked]: what a row of a recording does to a small private anonymous page on Linux 6.1.
EFFECT = np.ascontiguousarray(effects(Kernel.V6_1, Backing.ANONYMOUS)[0][:, (0, 2, 1), ROW])


def _events() -> tuple[int, ...]:
    """Return the mmu_notifier_event number that a row of a recording stands for, by HostOp (kvm_real README)."""
    events = {HostOp.NUMA_SCAN: 2, HostOp.MPROTECT: 2, HostOp.FORK: 3, HostOp.SOFT_DIRTY: 4, HostOp.MUNMAP: 0}
    return tuple(events.get(op, 1) for op in HostOp)


EVENT = np.array(_events(), dtype=np.int64)

_CPU_TOUCH = int(HostOp.CPU_TOUCH)
_REACHES_GUEST_MEMFD = (
    int(HostOp.CPU_TOUCH), int(HostOp.DONTNEED), int(HostOp.DIRTY_LOG), int(HostOp.MEMSLOT_DELETE),
    int(HostOp.MEMSLOT_READ_ONLY),
)  # fmt: skip


@jit
def _row_effect(m: Machine, i: int, op: int, word: int) -> int:
    locked = 1 if word & LOCKED != 0 else vm_row(m, i).locked
    state = (2 if word & PIN_MASK != 0 else 0) + locked
    return effect_table(m)[1 if word & HUGE != 0 else 0, op, state, ROW]


@jit
def operate_on_page(m: Machine, i: int, op: int, page: int) -> None:
    """Apply one row of a recording to one guest page of lane *i*."""
    par = params(m, i)
    word = host_page(m, i)[page]
    if word & HOLE != 0:
        return
    vm_row(m, i).host_op = op
    effect = _row_effect(m, i, op, word)
    if exempt(word, effect):
        return
    if effect & AGE != 0:
        age(m, i, page, page + 1, 1)
    if effect & WRITE_PROTECT != 0:
        protect_page(m, i, page, GONE_HOST)
    if effect & UNMAP != 0:
        notify(m, i, EVENT[op], why_of(op, EVENT[op]), page, page + 1, 1)
        if word & HUGE != 0 and effect & (SPLIT | MOVE | REPLACE | SHARE | SWAP | LOSE) != 0:
            split_folio(m, i, page)
        host_page(m, i)[page] = change_backing(m, i, host_page(m, i)[page], effect & ~(SPLIT | COLLAPSE))
        if word & PIN_MASK != 0 and effect & (REPLACE | LOSE | READ_ONLY) != 0:
            note_divergence(m, i, page)
        if effect & SHARE != 0 and par.change_pte != 0:
            map_ipa(m, i, (par.ram_page0 + page) << 12, KSM_FRAME, 0)
    if (word & ROLE_MASK) >> ROLE_SHIFT == ROLE_HOT:
        cpu_touch(m, i, page, 0)  # a CPU's next walk faults it in again, long before the SPU's


@jit
def _unmap_range(m: Machine, i: int, op: int, first: int, last: int) -> None:
    """Do what operate_on_page does for an operation that only unmaps, for many pages: a NUMA scan takes the VM."""
    vm_row(m, i).host_op = op
    notify(m, i, EVENT[op], why_of(op, EVENT[op]), first, last, 1)
    for page in range(first, last):
        if host_page(m, i)[page] & ROLE_MASK == ROLE_HOT << ROLE_SHIFT:
            cpu_touch(m, i, page, 0)


@jit
def _only_unmaps(m: Machine, i: int, op: int) -> bool:
    """Tell whether a row of *op* unmaps and does nothing else, whatever the page's state."""
    locked = vm_row(m, i).locked
    table = effect_table(m)
    for huge in range(2):
        if table[huge, op, locked, ROW] != UNMAP or table[huge, op, 2 + locked, ROW] != UNMAP:
            return False
    return True


@jit
def is_out_of_reach(m: Machine, i: int) -> bool:
    """Tell whether the host event that is due can change nothing that an SPU of lane *i* reads.

    Most recorded events are: the guest's CPU touches a page that holds neither buffer nor tables, below a stage 2 table
    that is there already. The order of such an event and of the SPU's writes does not matter.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    n = vm.host_index
    if par.host_kind != 2 or widen(rec_op(m)[n]) & 0x7F != _CPU_TOUCH or rec_end(m)[n] - rec_first(m)[n] != 1:
        return False
    page = widen(rec_first(m)[n])
    if host_page(m, i)[page] & ROLE_MASK != 0:
        return False
    slot, _entry = ipa_leaf(m, i, (par.ram_page0 + page) << 12)
    return slot >= 0


@jit
def host_event(m: Machine, i: int) -> None:
    """Apply the host event that is due in lane *i* and schedule the next one."""
    vm = vm_row(m, i)
    par = params(m, i)
    write = 0
    if par.host_kind == 1:
        op = random_op(m)[vm.host_index, 0]
        length = random_op(m)[vm.host_index, 2]
        first = draw(vm.key_host, vm.host_draws) % par.ram_pages
        vm.host_draws += 1
        # A range is aligned to its length, like the VMA or the scan window that it stands for.
        first -= first % length
        last = min(first + length, par.ram_pages)
    else:
        n = vm.host_index
        op = widen(rec_op(m)[n]) & 0x7F
        write = widen(rec_op(m)[n]) >> 7
        first = widen(rec_first(m)[n])
        last = widen(rec_end(m)[n])
    vm.host_events += 1
    host_ops(m, i)[op] += 1
    vm.host_op = op
    log_host(m, i, HOST_OP, op, first, last)
    if vm.guest_memfd != 0 and op not in _REACHES_GUEST_MEMFD:
        # guest_memfd folios are neither evictable nor movable, and KVM follows no notifier for such a slot. A hole
        # punch (the balloon's), KVM's own dirty log and changes of memslots remain (kvm.md P2e, H15).
        pass
    elif op == _CPU_TOUCH:
        for page in range(first, last):
            # The recorded guest touched its page; ours has its own users for buffer and table pages.
            if host_page(m, i)[page] & ROLE_MASK == 0:
                cpu_touch(m, i, page, write)
    elif par.host_kind == 1:
        operate(m, i, op, first, last)
    elif last - first > 1 and _only_unmaps(m, i, op):
        _unmap_range(m, i, op, first, last)
    else:
        for page in range(first, last):
            operate_on_page(m, i, op, page)
    schedule_host(m, i)


@jit
def schedule_host(m: Machine, i: int) -> None:
    """Set the host time and index of the next event of lane *i*."""
    vm = vm_row(m, i)
    par = params(m, i)
    if par.host_kind == 0:
        vm.host_next_ps = NEVER
    elif par.host_kind == 1:
        # Competing exponential clocks: the memoryless draw of each is repeated after every event.
        best = NEVER
        for r in range(random_op(m).shape[0]):
            wait = scaled_exponential(exponential(m), draw(vm.key_host, vm.host_draws), random_op(m)[r, 1])
            vm.host_draws += 1
            if wait < best:
                best = wait
                vm.host_index = r
        vm.host_next_ps += best
    else:
        before = rec_ps(m)[vm.host_index]
        vm.host_index += 1
        if vm.host_index == rec_ps(m).shape[0]:
            vm.host_index = 0
            gap = par.recording_span_ps - before + rec_ps(m)[0]
        else:
            gap = rec_ps(m)[vm.host_index] - before
        # Recording time runs recording_scale times faster than the lane's host time. Two steps, for gaps of hours.
        scale = par.recording_scale_q16
        vm.host_next_ps += ((gap // scale) << 16) + ((gap % scale) << 16) // scale
