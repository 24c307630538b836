"""One page of the guest's memory in the VMM: what backs it, how it gets into stage 2, and how a notifier takes it out.

The VMM's page table is one word a guest page, `Machine.host_page`: frame, state, pins (what the host knows), and why
stage 2 lost the page and what the guest uses it for (what only the judge may know).
"""

from __future__ import annotations

from typing import Any

from spepolicy.jit import jit
from spepolicy.machine.draw import draw
from spepolicy.machine.effects import KIND_AGE, KIND_SET_SPTE, ROW, UNMAP
from spepolicy.machine.pagetables import ipa_entry, map_ipa, map_ipa_block, unmap_ipa
from spepolicy.machine.rows import (
    dirty,
    effect_table,
    frames,
    host_calls,
    host_page,
    params,
    pool,
    pool_refs,
    tlb,
    truth_row,
    vcpu_row,
    vm_row,
)
from spepolicy.machine.scenario import ABSENT, Bug
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import UNMAPPED, log_host
from spepolicy.mmu.memory import attach, detach
from spepolicy.mmu.tables import S2_LEAF
from spepolicy.mmu.walker import AF, S2_WRITE, VALID

FRAME = 0xFFFF_FFFF
EMPTY = 1 << 32  # the VMA is there and nothing behind it yet
TRACKED = 1 << 33  # the host's entry is read-only, though the page is its own: a write makes it writable
READ_ONLY_VMA = 1 << 34  # writes are not allowed, by the VMA or by the memslot
HUGE = 1 << 35  # part of a huge page: 512 frames in a row, stage 2 maps a block
PRESENT = 1 << 36
SHARED = 1 << 37  # read-only: copy-on-write after fork, merged by KSM, or the zero page
HOLE = 1 << 38  # the VMA is gone, or allows no access
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
DEFERRED = 1 << 59  # KVM has records for it that it copies when the guest reads it
NOTIFIED = 1 << 60  # KVM's own note: a notifier made it unmap the page, and it has not mapped it since
LAZY_FREE = 1 << 61  # MADV_FREE since the last write
DIRTY = 1 << 62  # KVM's dirty log

RAM_FRAME0 = 0x40000
NEW_FRAME0 = 0x100_0000
KSM_FRAME = 0x80_0000  # the merged page; one is enough, no content is modelled
ZERO_FRAME = 0x80_0001
FOLIO = 512  # pages of a huge page

CLEAR = 1  # MMU_NOTIFY_CLEAR
# Classes of notifier calls, as bits of spepolicy.machine.hostops.Notifier.
WHY_ZAP, WHY_RMAP, WHY_MERGE, WHY_SPLIT, WHY_COPY, WHY_HINT = range(8, 14)
_MISSED_NOTIFIER = int(Bug.MISSED_NOTIFIER)
_PLAIN = PRESENT | SHARED | HOLE | TRACKED | READ_ONLY_VMA | HUGE


@jit
def bug_strikes(m: Machine, i: int) -> bool:
    """Draw whether the injected bug of KVM strikes here."""
    vm = vm_row(m, i)
    vm.bug_draws += 1
    return draw(vm.key_bug, vm.bug_draws) & 0xFFFF < params(m, i).bug_rate_q16


@jit
def taken(word: int, cause: int) -> int:
    """Return the word of a page that a notifier or KVM took out of stage 2: KVM's own note, and the judge's."""
    return (word & ~GONE_MASK) | NOTIFIED | (cause << GONE_SHIFT)


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
def set_frame(m: Machine, i: int, word: int, frame: int, carry: int) -> int:
    """Back a page with *frame*; with *carry* the content (a translation table) moves along. Return the new word."""
    if carry != 0:
        slot = detach(frames(m, i), word & FRAME)
        if slot >= 0:
            attach(frames(m, i), frame, slot)
    return (word & ~FRAME) | frame


@jit
def fresh_frame(vm: Any) -> int:
    """Return a host frame that nothing uses."""
    vm.next_frame += 1
    return vm.next_frame


@jit
def fresh_folio(vm: Any) -> int:
    """Return the first of 512 host frames in a row, aligned, that nothing uses."""
    first = (vm.next_frame + FOLIO) & ~(FOLIO - 1)
    vm.next_frame = first + FOLIO - 1
    return first


@jit
def split_folio(m: Machine, i: int, page: int) -> None:
    """The huge page that *page* is part of becomes 512 small ones, where they are."""
    words = host_page(m, i)
    first = page & ~(FOLIO - 1)
    for n in range(first, min(first + FOLIO, words.shape[0])):
        words[n] &= ~HUGE


# ---- notifiers -------------------------------------------------------------------------------------------------------


@jit
def _take_block(m: Machine, i: int, page: int, keep_pinned: int) -> None:
    """A notifier takes the block that maps *page*, whole, as kvm_pgtable_stage2_unmap does. With *keep_pinned* KVM has
    to split it: pinned pages stay mapped, one by one.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    words = host_page(m, i)
    first = page & ~(FOLIO - 1)
    slot, entry, _level = ipa_entry(m, i, (par.ram_page0 + page) << 12)
    writable = 1 if pool(m, i)[slot, entry] & S2_WRITE != 0 else 0
    unmap_ipa(m, i, (par.ram_page0 + page) << 12)
    vm.stage2_unmapped += 1
    for n in range(first, min(first + FOLIO, words.shape[0])):
        if keep_pinned != 0 and words[n] & PIN_MASK != 0:
            map_ipa(m, i, (par.ram_page0 + n) << 12, words[n] & FRAME, writable)
        else:
            words[n] = taken(words[n], GONE_HOST)
    invalidate_tlb(m, i, par.ram_page0 + first, par.ram_page0 + first + FOLIO)


@jit
def notify(m: Machine, i: int, event: int, why: int, first: int, last: int, times: int) -> None:
    """An MMU notifier of kind *event* and class *why* (bits of `Notifier`) fires *times* times for pages first..last-1:
    KVM unmaps them from stage 2, except for pinned pages where the policy's filter ignores it.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    words = host_page(m, i)
    tables = pool(m, i)
    refs = pool_refs(m, i)
    ignores = ((par.notifier_filter >> event) | (par.notifier_filter >> why)) & 1
    host_calls(m, i)[event] += times
    # Had KVM pinned the page as it believes, this operation would not have taken it.
    skips = effect_table(m)[0, vm.host_op, 2, ROW] & UNMAP == 0
    slot, level = -1, 0
    before, ignored = vm.stage2_unmapped, vm.notifier_ignored
    for page in range(first, last):
        ipa = (par.ram_page0 + page) << 12
        if page == first or ipa & 0x1F_FFFF == 0:
            slot, _entry, level = ipa_entry(m, i, ipa)
        word = words[page]
        if word & HOLE != 0:
            continue
        vm.notifier_calls += times
        if ignores != 0 and word & PIN_MASK != 0:
            vm.notifier_ignored += times
            continue
        if par.bug == _MISSED_NOTIFIER and bug_strikes(m, i):
            continue
        entry = (ipa >> 12) & 511
        if level != 3:
            if level == 2 and tables[slot, (ipa >> 21) & 511] & VALID != 0:
                _take_block(m, i, page, ignores)
                slot, _entry, level = ipa_entry(m, i, ipa)
        elif tables[slot, entry] & VALID != 0:
            words[page] = taken(word, GONE_BUG if skips and word & (SKIPPED | PIN_MASK) == SKIPPED else GONE_HOST)
            vm.stage2_unmapped += 1
            if refs[slot] == 1:
                unmap_ipa(m, i, ipa)  # the last entry: frees the table
                level = 0
            else:
                tables[slot, entry] = 0
                refs[slot] -= 1
    if last - first > 1 or vm.stage2_unmapped != before or vm.notifier_ignored != ignored:
        log_host(m, i, UNMAPPED, vm.host_op, first | ((last - first) << 32), vm.stage2_unmapped - before)
    if vm.stage2_unmapped != before:
        invalidate_tlb(m, i, par.ram_page0 + first, par.ram_page0 + last)


@jit
def repoint(m: Machine, i: int, page: int) -> None:
    """MMU notifier change_pte: KVM maps the page's new frame, read-only, if it has a table for it (set_spte_gfn brings
    no memory for tables). Gone with Linux 6.10.
    """
    par = params(m, i)
    if par.change_pte == 0:
        return
    host_calls(m, i)[KIND_SET_SPTE] += 1
    ipa = (par.ram_page0 + page) << 12
    _slot, _entry, level = ipa_entry(m, i, ipa)
    if level == 3:
        map_ipa(m, i, ipa, host_page(m, i)[page] & FRAME, 0)
        invalidate_tlb(m, i, par.ram_page0 + page, par.ram_page0 + page + 1)


@jit
def clear_in_leaf(m: Machine, i: int, page: int, bits: int) -> int:
    """Clear *bits* in what maps *page* at stage 2, a page or a block, and invalidate. Return which of them were set."""
    par = params(m, i)
    slot, entry, level = ipa_entry(m, i, (par.ram_page0 + page) << 12)
    descriptor = pool(m, i)[slot, entry]
    if descriptor & VALID == 0:
        return 0
    pool(m, i)[slot, entry] = descriptor & ~bits
    first, count = page, 1
    if level != 3:
        first, count = page & ~(FOLIO - 1), FOLIO
    invalidate_tlb(m, i, par.ram_page0 + first, par.ram_page0 + first + count)
    return descriptor & bits


@jit
def age(m: Machine, i: int, first: int, last: int, times: int) -> int:
    """kvm_age_gfn, *times* times: clear the accessed flag of pages first..last-1. Return 1 if one of them had it."""
    host_calls(m, i)[KIND_AGE] += times
    young = 0
    for page in range(first, last):
        if clear_in_leaf(m, i, page, AF) != 0:
            young = 1
    return young


@jit
def has_diverged(word: int, frame: int) -> bool:
    """Tell whether a writable stage 2 entry for *frame* is not what the VMM's own mapping, *word*, says (kvm.md H8)."""
    return word & (HOLE | READ_ONLY_VMA) != 0 or word & FRAME != frame


@jit
def note_divergence(m: Machine, i: int, page: int) -> None:
    """Judge only: the VMM has changed what is behind *page*, or may not write there any more. An SPU that still holds a
    translation of it, because a filter kept the notifier from KVM, writes to a page that the VMM's address does not
    show, or against the VMM's will.
    """
    par = params(m, i)
    word = host_page(m, i)[page]
    for k in range(par.vcpus):
        v = vcpu_row(m, i, k)
        entries = tlb(m, i, k)
        for e in range(entries.shape[0]):
            if entries[e, 0] == -1 or entries[e, 2] != par.ram_page0 + page or entries[e, 3] & 1 != 0:
                continue
            if has_diverged(word, entries[e, 1]):
                entries[e, 3] |= 1
                truth_row(m, i, k).diverged_pages += 1
                if entries[e, 0] == v.tlb_page:
                    truth_row(m, i, k).diverged_now = entries[e, 3]


# ---- faults ----------------------------------------------------------------------------------------------------------


@jit
def break_sharing(m: Machine, i: int, page: int) -> int:
    """Copy a shared page for its writer (do_wp_page): the notifier takes the old one, a huge page is split before
    (__split_huge_pmd), change_pte shows the new one. Return the cost in ps.
    """
    vm = vm_row(m, i)
    words = host_page(m, i)
    calls = vm.notifier_calls  # a recording has these calls as rows of their own
    if words[page] & HUGE != 0:
        first = page & ~(FOLIO - 1)
        notify(m, i, CLEAR, WHY_SPLIT, first, min(first + FOLIO, words.shape[0]), 1)
        split_folio(m, i, page)
    notify(m, i, CLEAR, WHY_COPY, page, page + 1, 1)
    vm.notifier_calls = calls
    words[page] = set_frame(m, i, words[page], fresh_frame(vm), 1) & ~SHARED
    repoint(m, i, page)
    return params(m, i).copy_page_ps


@jit
def _fetch(m: Machine, i: int, page: int) -> int:
    """Read *page* from swap, or in post-copy from the source of the migration. Return the cost in ps."""
    par = params(m, i)
    if par.migration_kind == 0 or dirty(m, i)[page] & ABSENT == 0:
        return par.swap_in_ps
    dirty(m, i)[page] = 0
    vm_row(m, i).migration_demanded += 1
    return par.migration_request_ps


@jit
def resident(m: Machine, i: int, page: int, write: int) -> int:
    """Make the VMM's page usable for a stage 2 mapping or a pin (get_user_pages). Return the cost in ps, or -1 if the
    VMA does not allow it.
    """
    vm = vm_row(m, i)
    word = host_page(m, i)[page]
    if word & HOLE != 0 or (write != 0 and word & READ_ONLY_VMA != 0):
        return -1
    cost = 0
    if word & PRESENT == 0:
        if word & (EMPTY | PIN_MASK) == 0:  # a pinned page stays in the page cache: it was unmapped only
            word = set_frame(m, i, word, fresh_frame(vm), 1)
            cost += _fetch(m, i, page)
        elif word & EMPTY != 0 and write == 0:
            word = set_frame(m, i, word, ZERO_FRAME, 0) | SHARED
        word = (word & ~EMPTY) | PRESENT
        host_page(m, i)[page] = word
    if write != 0:
        if word & SHARED != 0:
            cost += break_sharing(m, i, page)
            word = host_page(m, i)[page]
        if word & HUGE != 0 and word & (TRACKED | LAZY_FREE) != 0:
            first = page & ~(FOLIO - 1)
            for n in range(first, first + FOLIO):
                host_page(m, i)[n] &= ~(TRACKED | LAZY_FREE)
        host_page(m, i)[page] = host_page(m, i)[page] & ~(TRACKED | LAZY_FREE)
    return cost


@jit
def pin_page(m: Machine, i: int, page: int) -> int:
    """Pin *page* for long (pin_user_pages with FOLL_WRITE and FOLL_LONGTERM). Return the cost in ps, or -1 as
    `resident`. A page in ZONE_MOVABLE is moved out first, which fires a notifier (measured: run movablecore).
    """
    vm = vm_row(m, i)
    par = params(m, i)
    cost = resident(m, i, page, 1)
    if cost < 0:
        return cost
    words = host_page(m, i)
    if par.zone_movable != 0 and RAM_FRAME0 <= words[page] & FRAME < RAM_FRAME0 + words.shape[0]:
        first, count, frame = page, 1, -1
        if words[page] & HUGE != 0:
            first, count, frame = page & ~(FOLIO - 1), FOLIO, fresh_folio(vm)
        notify(m, i, CLEAR, WHY_RMAP, first, first + count, 1)
        for n in range(first, first + count):
            words[n] = set_frame(m, i, words[n], frame + n - first if frame >= 0 else fresh_frame(vm), 1)
        cost += count * par.copy_page_ps
    words[page] += PIN_ONE
    return cost


@jit
def map_page(m: Machine, i: int, page: int, write: int) -> int:
    """Fault *page* in and map it at stage 2, as user_mem_abort does. Return the cost in ps of the host's part, or -1 if
    there is no page.
    """
    swapped = host_page(m, i)[page] & (PRESENT | EMPTY) == 0
    cost = resident(m, i, page, write)
    if cost < 0:
        return cost
    vm = vm_row(m, i)
    par = params(m, i)
    word = host_page(m, i)[page]
    writable = 0 if word & (SHARED | READ_ONLY_VMA) != 0 else 1
    # A page that a read brings back from swap is mapped read-only on 6.1 (recording swap: 11075 of 11206 maps), and so
    # is one whose entry in the host is read-only, or any that is only read while dirty pages are logged.
    if write == 0 and (word & TRACKED != 0 or (swapped and par.swap_read_only != 0) or vm.dirty_logging != 0):
        writable = 0
    first, count = page, 1
    if word & HUGE != 0 and vm.dirty_logging == 0:
        first, count = page & ~(FOLIO - 1), FOLIO
        frame = (word & FRAME) - (page - first)
        change = map_ipa_block(m, i, (par.ram_page0 + first) << 12, frame, writable)
    else:
        change = map_ipa(m, i, (par.ram_page0 + page) << 12, word & FRAME, writable)
    if change != 0:
        vm.stage2_maps += 1
    if change == 2:
        # Replacing a valid entry is break-before-make, which ends in a TLBI; an invalid one was in no TLB.
        invalidate_tlb(m, i, par.ram_page0 + first, par.ram_page0 + first + count)
    elif change == 3:
        block = page & ~(FOLIO - 1)
        invalidate_tlb(m, i, par.ram_page0 + block, par.ram_page0 + block + FOLIO)
        for n in range(block, block + FOLIO):  # KVM's dirty log broke the block: what it mapped is gone
            cause = GONE_HOST if vm.migration_phase == 0 else GONE_MIGRATION
            host_page(m, i)[n] = taken(host_page(m, i)[n], cause)
        word = host_page(m, i)[page]
    if writable != 0:
        # The SPU could not write behind a read-only entry: then the host is still to blame for what it did before.
        for n in range(first, first + count):
            host_page(m, i)[n] = host_page(m, i)[n] & ~(GONE_MASK | NOTIFIED | LAZY_FREE)  # kvm_set_pfn_dirty
        if vm.dirty_logging != 0:
            host_page(m, i)[page] |= DIRTY
    return cost


@jit
def fault_of(m: Machine, i: int, page: int, write: int, hardware_access_flag: int) -> int:
    """Return the stage 2 fault that an access of the guest's CPU takes, as the fault status without the stage: 4 to 7
    translation, 8 to 11 access flag, 12 to 15 permission, each plus the level. 0: none.
    """
    slot, entry, level = ipa_entry(m, i, (params(m, i).ram_page0 + page) << 12)
    descriptor = pool(m, i)[slot, entry]
    if descriptor & VALID == 0:
        return 4 + level
    if descriptor & AF == 0 and hardware_access_flag == 0:
        return 8 + level
    if write != 0 and descriptor & S2_WRITE == 0:
        return 12 + level
    return 0


@jit
def fault_in(m: Machine, i: int, page: int, write: int) -> int:
    """Handle one stage 2 fault of the guest's CPU. Return 1 if the page is mapped now, 0 if the guest has to try again
    because a notifier came while KVM asked for the page (mmu_notifier_retry), -1 if KVM gives up (EFAULT).
    """
    word = host_page(m, i)[page]
    if write != 0 and word & (PRESENT | SHARED | HOLE | READ_ONLY_VMA) == PRESENT | SHARED:
        break_sharing(m, i, page)
        return 0
    return -1 if map_page(m, i, page, write) < 0 else 1


@jit
def cpu_touch(m: Machine, i: int, page: int, write: int) -> int:
    """The guest's CPU accesses *page*: an ordinary stage 2 fault if it is not mapped. Return 1 if it was one."""
    vm = vm_row(m, i)
    tables = pool(m, i)
    slot, entry, level = ipa_entry(m, i, (params(m, i).ram_page0 + page) << 12)
    descriptor = tables[slot, entry]
    if descriptor & VALID != 0:
        if write == 0 or descriptor & S2_WRITE != 0:
            tables[slot, entry] = descriptor | AF  # hardware access flag of the CPU, VTCR_EL2.HA
            return 0
    elif level == 3 and vm.dirty_logging == 0:
        word = host_page(m, i)[page]
        if word & _PLAIN == PRESENT:
            # The plain case of map_page: a resident page, nothing mapped, no TLB to tell.
            tables[slot, entry] = ((word & FRAME) << 12) | S2_LEAF | S2_WRITE
            pool_refs(m, i)[slot] += 1
            vm.stage2_maps += 1
            host_page(m, i)[page] = word & ~(GONE_MASK | NOTIFIED | LAZY_FREE)
            return 1
    map_page(m, i, page, write)
    return 1
