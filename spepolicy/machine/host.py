"""The host's memory management: what each operation does to a page of the guest, its stage 2 entry, and KVM's pin on
it.

The table `EFFECT` is what a real Linux 6.1 did to private anonymous 4 KiB pages, unpinned and pinned with FOLL_LONGTERM
(measured: kvm_real/pin_table, short_6.1.md, columns U and P). Its main message: FOLL_PIN keeps the *page*, not KVM's
stage 2 mapping, because MMU notifiers fire by range before anybody looks at the pin count.

The VMM's page table is one word a guest page, `Machine.host_page`: frame, state, pins (what the host knows), and why
stage 2 lost the page and what the guest uses it for (what only the judge may know).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spepolicy.jit import jit, widen
from spepolicy.machine.draw import draw, scaled_exponential
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.pagetables import ipa_leaf, map_ipa, unmap_ipa
from spepolicy.machine.rows import (
    exponential,
    frames,
    host_ops,
    host_page,
    params,
    pool,
    pool_refs,
    random_op,
    rec_end,
    rec_first,
    rec_op,
    rec_ps,
    tlb,
    vcpu_row,
    vm_row,
)
from spepolicy.machine.scenario import Bug
from spepolicy.machine.state import NEVER, Machine
from spepolicy.machine.trace import HOST_OP, UNMAPPED, log_host
from spepolicy.mmu.memory import attach, detach
from spepolicy.mmu.tables import S2_LEAF
from spepolicy.mmu.walker import AF, S2_WRITE, VALID

FRAME = 0xF_FFFF_FFFF
PRESENT = 1 << 36
SHARED = 1 << 37  # read-only: copy-on-write after fork, or merged by KSM
HOLE = 1 << 38  # the VMA is gone
LOCKED = 1 << 39  # the VMM has mlock()ed it
PIN_ONE = 1 << 40
PIN_MASK = 0xFFF << 40
GONE_SHIFT = 52  # judge only: who removed the stage 2 entry
GONE_MASK = 0xF << GONE_SHIFT
GONE_NEVER = 0
GONE_HOST = 1
GONE_GUEST = 2
GONE_BUG = 3  # the host could take it only because a bug of KVM had left it unpinned
GONE_MIGRATION = 4
ROLE_SHIFT = 56  # judge only: what the guest uses the page for
ROLE_MASK = 3 << ROLE_SHIFT
ROLE_OTHER = 0
ROLE_BUFFER = 1
ROLE_TABLE = 2  # stage 1 table that only the SPE buffer is reached by
ROLE_HOT = 3  # stage 1 table that the guest's CPUs walk all the time
SKIPPED = 1 << 58  # judge only: KVM's list says that it is pinned, but an injected bug left it out
NOTIFIED = 1 << 60  # KVM's own note: a notifier made it unmap the page, and it has not mapped it since
DEFERRED = 1 << 59  # KVM has records for it that it copies when the guest reads it

RAM_FRAME0 = 0x40000
NEW_FRAME0 = 0x100_0000
KSM_FRAME = 0x80_0000  # the merged page; one is enough, no content is modelled

UNMAP = 1  # a notifier removes the stage 2 entry
MOVE = 2  # the page gets another frame, same content
SWAP = 4
SHARE = 8  # merged by KSM: another frame, read-only, and stage 2 is re-pointed to it (kvm_set_spte_gfn)
AGE = 16  # the stage 2 access flag is cleared
WRITE_PROTECT = 32
REPLACE = 64  # another page, other content: a pin on the old one is stale
LOSE = 128  # no page any more
COPY_ON_WRITE = 256


def _effects() -> tuple[tuple[int, int, int], ...]:
    """Return (unpinned, pinned, mlocked) effects by HostOp: the first two as measured on 6.1.

    Of mlock() the kernel promises residence only: an unevictable page is neither reclaimed nor discarded (madvise()
    answers EINVAL for VM_LOCKED), but is moved, merged, scanned and forked as any other (P:ec4a346d, P:709f72e5).
    """
    table = {
        HostOp.RECLAIM: (UNMAP | SWAP, AGE),
        HostOp.AGE: (AGE, AGE),
        HostOp.KSM: (UNMAP | SHARE, UNMAP),
        HostOp.NUMA_SCAN: (UNMAP, UNMAP),
        HostOp.NUMA_MIGRATE: (UNMAP | MOVE, 0),
        HostOp.MOVE: (UNMAP | MOVE, UNMAP),  # pinned: ten retries, ten unmaps, all for nothing
        HostOp.COMPACT: (UNMAP | MOVE, 0),  # the refcount is tested before isolation
        HostOp.FORK: (UNMAP | COPY_ON_WRITE, UNMAP),  # pinned pages are copied for the child at once
        HostOp.DONTNEED: (UNMAP | REPLACE, UNMAP | REPLACE),
        HostOp.MUNMAP: (UNMAP | LOSE, UNMAP | LOSE),
        HostOp.MPROTECT: (UNMAP, UNMAP),
        HostOp.THP: (UNMAP | MOVE, 0),
        HostOp.DIRTY_LOG: (WRITE_PROTECT, WRITE_PROTECT),
        HostOp.SOFT_DIRTY: (UNMAP, UNMAP),
    }
    locked = {HostOp.RECLAIM: 0, HostOp.DONTNEED: 0}
    rows = ((op, table.get(HostOp(op), (0, 0))) for op in range(16))
    return tuple((*row, locked.get(HostOp(op), row[0])) for op, row in rows)


EFFECT = np.array(_effects(), dtype=np.int64)  # [HostOp, unpinned | pinned | mlocked]


def _events() -> tuple[int, ...]:
    """Return the mmu_notifier_event number by HostOp (kvm_real README: 0 UNMAP 1 CLEAR 2 PROTECTION_VMA 3
    PROTECTION_PAGE 4 SOFT_DIRTY).
    """
    events = {HostOp.NUMA_SCAN: 2, HostOp.MPROTECT: 2, HostOp.FORK: 3, HostOp.SOFT_DIRTY: 4, HostOp.MUNMAP: 0}
    return tuple(events.get(HostOp(op), 1) for op in range(16))


EVENT = np.array(_events(), dtype=np.int64)

_CPU_TOUCH = int(HostOp.CPU_TOUCH)
_DIRTY_LOG = int(HostOp.DIRTY_LOG)
_DONTNEED = int(HostOp.DONTNEED)
_MISSED_NOTIFIER = int(Bug.MISSED_NOTIFIER)


@jit
def bug_strikes(m: Machine, i: int) -> bool:
    """Draw whether the injected bug of KVM strikes here."""
    vm = vm_row(m, i)
    vm.bug_draws += 1
    return draw(vm.key_bug, vm.bug_draws) & 0xFFFF < params(m, i).bug_rate_q16


@jit
def invalidate_tlb(m: Machine, i: int, first: int, end: int) -> None:
    """KVM's TLBI after a stage 2 change: no SPU of lane *i* may use an entry for IPA pages first..end-1 any more."""
    for k in range(params(m, i).vcpus):
        v = vcpu_row(m, i, k)
        entries = tlb(m, i, k)
        for e in range(entries.shape[0]):
            if entries[e, 0] != -1 and first <= entries[e, 2] < end:
                if entries[e, 0] == v.tlb_page:
                    v.tlb_page = -1
                entries[e, 0] = -1


@jit
def _set_frame(m: Machine, i: int, page: int, word: int, frame: int, carry: int) -> int:
    """Back *page* with *frame*; with *carry* the content (a translation table) moves along. Return the new word."""
    if carry != 0:
        slot = detach(frames(m, i), word & FRAME)
        if slot >= 0:
            attach(frames(m, i), frame, slot)
    return (word & ~FRAME) | frame


@jit
def _fresh_frame(vm: Any) -> int:
    vm.next_frame += 1
    return vm.next_frame


@jit
def resident(m: Machine, i: int, page: int, write: int) -> int:
    """Make the VMM's page usable for a stage 2 mapping or a pin (get_user_pages). Return the cost in ps, or -1 if there
    is no VMA.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    word = host_page(m, i)[page]
    if word & HOLE != 0:
        return -1
    cost = 0
    if word & PRESENT == 0:
        word = _set_frame(m, i, page, word, _fresh_frame(vm), 1) | PRESENT
        cost += par.swap_in_ps
    if write != 0 and word & SHARED != 0:
        word = _set_frame(m, i, page, word, _fresh_frame(vm), 1) & ~SHARED
        cost += par.copy_page_ps
    host_page(m, i)[page] = word
    return cost


@jit
def map_page(m: Machine, i: int, page: int, write: int) -> int:
    """Fault *page* in and map it at stage 2, as user_mem_abort does. Return the cost in ps of the host's part, or -1 if
    there is no page.
    """
    swapped = host_page(m, i)[page] & PRESENT == 0
    cost = resident(m, i, page, write)
    if cost < 0:
        return cost
    vm = vm_row(m, i)
    par = params(m, i)
    word = host_page(m, i)[page]
    # A page that a read brings back from swap is mapped read-only (recording swap: 11075 of 11206 maps).
    writable = 0 if word & SHARED != 0 or (swapped and write == 0) else 1
    ipa = (par.ram_page0 + page) << 12
    change = map_ipa(m, i, ipa, word & FRAME, writable)
    if change != 0:
        vm.stage2_maps += 1
    if change == 2:
        # Replacing a valid entry is break-before-make, which ends in a TLBI; an invalid one was in no TLB.
        invalidate_tlb(m, i, par.ram_page0 + page, par.ram_page0 + page + 1)
    if writable != 0:
        # The SPU could not write behind a read-only entry: then the host is still to blame for what it did before.
        host_page(m, i)[page] = word & ~(GONE_MASK | NOTIFIED)
    return cost


@jit
def cpu_touch(m: Machine, i: int, page: int, write: int) -> int:
    """The guest's CPU accesses *page*: an ordinary stage 2 fault if it is not mapped. Return 1 if it was one."""
    vm = vm_row(m, i)
    tables = pool(m, i)
    slot, entry = ipa_leaf(m, i, (params(m, i).ram_page0 + page) << 12)
    if slot >= 0:
        descriptor = tables[slot, entry]
        if descriptor & VALID != 0:
            if write == 0 or descriptor & S2_WRITE != 0:
                tables[slot, entry] = descriptor | AF  # hardware access flag of the CPU, VTCR_EL2.HA
                return 0
        else:
            word = host_page(m, i)[page]
            if word & (PRESENT | SHARED | HOLE) == PRESENT:
                # The plain case of map_page: a resident page, nothing mapped, no TLB to tell.
                tables[slot, entry] = ((word & FRAME) << 12) | S2_LEAF | S2_WRITE
                pool_refs(m, i)[slot] += 1
                vm.stage2_maps += 1
                host_page(m, i)[page] = word & ~(GONE_MASK | NOTIFIED)
                return 1
    map_page(m, i, page, write)
    return 1


@jit
def _edit_leaf(m: Machine, i: int, page: int, clear: int) -> None:
    par = params(m, i)
    slot, entry = ipa_leaf(m, i, (par.ram_page0 + page) << 12)
    if slot >= 0 and pool(m, i)[slot, entry] & 1 != 0:
        pool(m, i)[slot, entry] &= ~clear
        invalidate_tlb(m, i, par.ram_page0 + page, par.ram_page0 + page + 1)


@jit
def operate_on_page(m: Machine, i: int, op: int, page: int) -> None:
    """Apply one host operation to one guest page of lane *i*."""
    vm = vm_row(m, i)
    par = params(m, i)
    word = host_page(m, i)[page]
    role = (word & ROLE_MASK) >> ROLE_SHIFT
    if word & HOLE != 0:
        return
    pinned = word & PIN_MASK != 0
    effect = EFFECT[op, 1 if pinned else (2 if word & LOCKED != 0 else 0)]
    if effect & (SHARE | REPLACE | LOSE) != 0 and role >= ROLE_TABLE:
        # a live translation table is not identical to another page, and no VMM discards a page that the guest uses so
        return
    if effect & AGE != 0:
        _edit_leaf(m, i, page, AF)
    if effect & WRITE_PROTECT != 0:
        _edit_leaf(m, i, page, S2_WRITE)
        host_page(m, i)[page] = (host_page(m, i)[page] & ~GONE_MASK) | NOTIFIED | (GONE_HOST << GONE_SHIFT)
    if effect & UNMAP != 0:
        vm.notifier_calls += 1
        before = vm.stage2_unmapped
        if pinned and (par.notifier_filter >> EVENT[op]) & 1 != 0:
            vm.notifier_ignored += 1
        elif par.bug != _MISSED_NOTIFIER or not bug_strikes(m, i):
            ipa = (par.ram_page0 + page) << 12
            if unmap_ipa(m, i, ipa) != 0:
                vm.stage2_unmapped += 1
                skipped = not pinned and word & SKIPPED != 0 and EFFECT[op, 1] & UNMAP == 0
                word = (word & ~GONE_MASK) | NOTIFIED | ((GONE_BUG if skipped else GONE_HOST) << GONE_SHIFT)
                invalidate_tlb(m, i, par.ram_page0 + page, par.ram_page0 + page + 1)
        if word & PIN_MASK != 0 or vm.stage2_unmapped != before:
            log_host(m, i, UNMAPPED, op, page | (1 << 32), vm.stage2_unmapped - before)
        host_page(m, i)[page] = _change_backing(m, i, page, word, effect)
    if role == ROLE_HOT:
        cpu_touch(m, i, page, 0)  # a CPU's next walk faults it in again, long before the SPU's


@jit
def _unmap_range(m: Machine, i: int, op: int, first: int, last: int) -> None:
    """Do what operate_on_page does for an operation that only unmaps, for many pages: a NUMA scan takes the VM."""
    vm = vm_row(m, i)
    par = params(m, i)
    words = host_page(m, i)
    tables = pool(m, i)
    refs = pool_refs(m, i)
    ignores = (par.notifier_filter >> EVENT[op]) & 1 != 0
    before = vm.stage2_unmapped
    slot = -1
    for page in range(first, last):
        ipa = (par.ram_page0 + page) << 12
        if page == first or ipa & 0x1F_FFFF == 0:
            slot, _entry = ipa_leaf(m, i, ipa)
        word = words[page]
        if word & HOLE != 0:
            continue
        vm.notifier_calls += 1
        if ignores and word & PIN_MASK != 0:
            vm.notifier_ignored += 1
            continue
        if par.bug == _MISSED_NOTIFIER and bug_strikes(m, i):
            continue
        if slot >= 0 and tables[slot, (ipa >> 12) & 511] & 1 != 0:
            words[page] = (word & ~GONE_MASK) | NOTIFIED | (GONE_HOST << GONE_SHIFT)
            vm.stage2_unmapped += 1
            if refs[slot] == 1:
                unmap_ipa(m, i, ipa)  # the last entry: frees the table
                slot = -1
            else:
                tables[slot, (ipa >> 12) & 511] = 0
                refs[slot] -= 1
    log_host(m, i, UNMAPPED, op, first | ((last - first) << 32), vm.stage2_unmapped - before)
    invalidate_tlb(m, i, par.ram_page0 + first, par.ram_page0 + last)
    for page in range(first, last):
        if words[page] & ROLE_MASK == ROLE_HOT << ROLE_SHIFT:
            cpu_touch(m, i, page, 0)


@jit
def _change_backing(m: Machine, i: int, page: int, word: int, effect: int) -> int:
    """Apply what the operation does to the VMM's own page; return the new word."""
    vm = vm_row(m, i)
    par = params(m, i)
    if effect & MOVE != 0:
        word = _set_frame(m, i, page, word, _fresh_frame(vm), 1)
    if effect & SWAP != 0:
        word &= ~PRESENT
    if effect & COPY_ON_WRITE != 0:
        word |= SHARED
    if effect & SHARE != 0:
        word = _set_frame(m, i, page, word, KSM_FRAME, 0) | SHARED
        ipa = (par.ram_page0 + page) << 12
        map_ipa(m, i, ipa, KSM_FRAME, 0)
    if effect & REPLACE != 0:
        if word & PIN_MASK != 0:
            vm.stale_pins += 1
        word = _set_frame(m, i, page, word, _fresh_frame(vm), 0)
    if effect & LOSE != 0:
        word = (word | HOLE) & ~PRESENT
    return word


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
        op = (rec_op(m)[n]) & 0x7F
        write = (rec_op(m)[n]) >> 7
        first = widen(rec_first(m)[n])
        last = widen(rec_end(m)[n])
    vm.host_events += 1
    host_ops(m, i)[op] += 1
    log_host(m, i, HOST_OP, op, first, last)
    if vm.guest_memfd != 0 and op != _CPU_TOUCH and op != _DONTNEED and op != _DIRTY_LOG:
        # guest_memfd folios are neither evictable nor movable, and KVM follows no notifier for such a slot. A hole
        # punch (the balloon's) and KVM's own dirty log remain (kvm.md P2e, H15).
        pass
    elif op == _CPU_TOUCH:
        for page in range(first, last):
            # The recorded guest touched its page; ours has its own users for buffer and table pages.
            if host_page(m, i)[page] & ROLE_MASK == 0:
                cpu_touch(m, i, page, write)
    elif EFFECT[op, 0] == UNMAP and EFFECT[op, 1] == UNMAP and last - first > 1:
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
        best = widen(NEVER)
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
