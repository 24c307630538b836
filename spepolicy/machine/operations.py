"""The host's operations on a range of the guest's memory, as the table of effects says (`spepolicy.machine.effects`).

`operate` plays a whole operation: every notifier call in order, then what becomes of the VMM's pages.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import jit
from spepolicy.machine.dirtylog import KEEP_NONE, write_protect
from spepolicy.machine.effects import (
    COLLAPSE,
    COPY_ON_WRITE,
    COUNT_SHIFT,
    EDGES,
    KIND_AGE,
    KIND_DROP,
    KIND_MASK,
    KIND_SET_SPTE,
    KIND_WRITE_PROTECT,
    LAZY,
    LOSE,
    MOVE,
    OUTCOME,
    READ_ONLY,
    REPLACE,
    SCOPE_MASK,
    SCOPE_SHIFT,
    SHARE,
    SPAN,
    SPARE,
    SPLIT,
    STEPS,
    SWAP,
    WRITABLE,
    WRITE_TRACKED,
    ZERO,
)
from spepolicy.machine.effects import (
    FOLIO as SCOPE_FOLIO,
)
from spepolicy.machine.effects import (
    PAGE as SCOPE_PAGE,
)
from spepolicy.machine.hostops import Backing, HostOp
from spepolicy.machine.hostpage import (
    EMPTY,
    FOLIO,
    FRAME,
    GONE_HOST,
    HOLE,
    HUGE,
    KSM_FRAME,
    LAZY_FREE,
    LOCKED,
    PIN_MASK,
    PRESENT,
    READ_ONLY_VMA,
    ROLE_HOT,
    ROLE_MASK,
    ROLE_SHIFT,
    ROLE_TABLE,
    SHARED,
    TRACKED,
    WHY_HINT,
    WHY_MERGE,
    WHY_RMAP,
    WHY_SPLIT,
    WHY_ZAP,
    age,
    cpu_touch,
    fresh_folio,
    fresh_frame,
    invalidate_tlb,
    note_divergence,
    notify,
    repoint,
    set_frame,
    split_folio,
    taken,
)
from spepolicy.machine.pagetables import unmap_ipa
from spepolicy.machine.rows import effect_table, host_calls, host_page, params, vm_row
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import UNMAPPED, log_host

_RECLAIMS = (int(HostOp.RECLAIM), int(HostOp.PAGEOUT), int(HostOp.PAGEOUT_PART))
_RECLAIM, _PAGEOUT, _PAGEOUT_PART = _RECLAIMS
_RECLAIM_LAZY = int(HostOp.RECLAIM_LAZY)
_THP = int(HostOp.THP)
_SLOT_OPS = (int(HostOp.MEMSLOT_DELETE), int(HostOp.MEMSLOT_READ_ONLY))


def _classes() -> NDArray[np.int64]:
    """Return the class of notifier calls of each HostOp, 0 where the event says it all."""
    found = np.zeros(len(HostOp), dtype=np.int64)
    for op in (HostOp.DONTNEED, HostOp.REMOVE, HostOp.PUNCH_HOLE, HostOp.TRUNCATE):
        found[op] = WHY_ZAP
    for op in (
        HostOp.RECLAIM, HostOp.RECLAIM_LAZY, HostOp.PAGEOUT, HostOp.PAGEOUT_PART, HostOp.FREE, HostOp.MOVE,
        HostOp.MBIND, HostOp.COMPACT, HostOp.NUMA_MIGRATE, HostOp.SOFT_OFFLINE,
    ):  # fmt: skip
        found[op] = WHY_RMAP
    found[HostOp.KSM] = WHY_MERGE
    found[HostOp.NUMA_SCAN] = WHY_HINT
    found[[HostOp.THP, HostOp.THP_SPLIT]] = WHY_SPLIT
    return found


WHY = _classes()
_HUGETLB = int(Backing.HUGETLB)


# ---- what becomes of pages -------------------------------------------------------------------------------------------


@jit
def why_of(op: int, event: int) -> int:
    """Return the class of the calls of *event* that HostOp *op* makes; the event itself where there is none."""
    return WHY[op] if WHY[op] != 0 else event


@jit
def exempt(word: int, effect: int) -> bool:
    """Tell whether an operation leaves a page alone because of what the guest uses it for: a live translation table is
    not identical to another page, and no VMM discards a page that the guest uses so.
    """
    return effect & (SHARE | REPLACE | LOSE) != 0 and (word & ROLE_MASK) >> ROLE_SHIFT >= ROLE_TABLE


@jit
def change_backing(m: Machine, i: int, word: int, effect: int) -> int:
    """Apply what an operation does to the VMM's own page; return the new word. SPLIT and COLLAPSE are for others."""
    vm = vm_row(m, i)
    if effect & MOVE != 0:
        word = set_frame(m, i, word, fresh_frame(vm), 1)
    if effect & SWAP != 0:
        word &= ~PRESENT
    if effect & COPY_ON_WRITE != 0:
        word |= SHARED
    if effect & SHARE != 0:
        word = set_frame(m, i, word, KSM_FRAME, 0) | SHARED
    if effect & REPLACE != 0:
        if word & PIN_MASK != 0:
            vm.stale_pins += 1
        word = set_frame(m, i, word, fresh_frame(vm), 0) & ~(SHARED | TRACKED | LAZY_FREE)
        word = (word & ~PRESENT) | EMPTY if effect & ZERO != 0 else word | PRESENT
    if effect & LOSE != 0:
        word = (word | HOLE) & ~PRESENT
    if effect & READ_ONLY != 0:
        word |= READ_ONLY_VMA
    if effect & WRITABLE != 0:
        word &= ~READ_ONLY_VMA
    if effect & WRITE_TRACKED != 0:
        word |= TRACKED
    if effect & LAZY != 0:
        word |= LAZY_FREE
    return word


@jit
def _change_pages(m: Machine, i: int, first: int, last: int, effect: int) -> None:
    """Apply *effect* to pages first..last-1. A huge page that moves stays one."""
    words = host_page(m, i)
    whole = effect & COLLAPSE != 0 or (words[first] & HUGE != 0 and last - first == FOLIO and effect & SPLIT == 0)
    folio = -1
    if whole and effect & MOVE != 0:
        folio = fresh_folio(vm_row(m, i))
    elif words[first] & HUGE != 0 and (
        effect & (MOVE | REPLACE | SHARE | SWAP | LOSE) != 0 or (effect & READ_ONLY != 0 and not whole)
    ):
        split_folio(m, i, first)  # no block may map what is only partly writable
    for page in range(first, last):
        word = words[page]
        if word & HOLE != 0 or exempt(word, effect):
            continue
        if folio >= 0:
            word = set_frame(m, i, word, folio + page - first, 1)
            words[page] = change_backing(m, i, word, effect & ~MOVE)
        else:
            words[page] = change_backing(m, i, word, effect)
        if effect & COLLAPSE != 0:
            words[page] = (words[page] | HUGE | PRESENT) & ~EMPTY
        if word & PIN_MASK != 0 and effect & (REPLACE | LOSE | READ_ONLY) != 0:
            note_divergence(m, i, page)
    if effect & SPLIT != 0:
        split_folio(m, i, first)


# ---- a whole operation -----------------------------------------------------------------------------------------------


@jit
def _folio_pinned(m: Machine, i: int, page: int) -> bool:
    words = host_page(m, i)
    first = page & ~(FOLIO - 1)
    for n in range(first, min(first + FOLIO, words.shape[0])):  # noqa: SIM110 - compiled code has no generators
        if words[n] & PIN_MASK != 0:
            return True
    return False


@jit
def _row(m: Machine, i: int, op: int, page: int) -> int:
    """Return which row of the table holds for *page*: 4 times huge, plus the state (1 mlocked, 2 pinned). -1: none."""
    word = host_page(m, i)[page]
    if word & HOLE != 0:
        return -1
    huge = 1 if word & HUGE != 0 else 0
    pinned = _folio_pinned(m, i, page) if huge != 0 else word & PIN_MASK != 0
    locked = 1 if word & LOCKED != 0 else vm_row(m, i).locked
    state = (2 if pinned else 0) + locked
    effect = effect_table(m)[huge, op, state, OUTCOME]
    if huge == 0 and exempt(word, effect):
        return -1
    if effect & SWAP != 0 and word & PRESENT == 0:
        return -1  # nothing to reclaim
    if effect & SHARE != 0 and word & (SHARED | FRAME) == SHARED | KSM_FRAME:
        return -1  # merged already
    return 4 * huge + state


@jit
def _has_same_row(word: int, before: int) -> bool:
    """Tell whether `_row` surely says the same of two small pages: they differ in their frames only."""
    return (word ^ before) & ~FRAME == 0 and word & (HUGE | SHARED) == 0


@jit
def _edges(m: Machine, i: int, first: int, last: int, kind: int, times: int) -> None:
    """Notify of the 2 MiB around each end of first..last that is not a multiple of 2 MiB."""
    pages = host_page(m, i).shape[0]
    before = -1
    if first & (FOLIO - 1) != 0:
        before = first & ~(FOLIO - 1)
        notify(m, i, kind, WHY_SPLIT, before, min(before + FOLIO, pages), times)
    behind = last & ~(FOLIO - 1)
    if last & (FOLIO - 1) != 0 and behind != before:
        notify(m, i, kind, WHY_SPLIT, behind, min(behind + FOLIO, pages), times)


@jit
def _folios(m: Machine, i: int, first: int, last: int, kind: int, times: int) -> None:
    """Notify of each huge page in first..last."""
    words = host_page(m, i)
    page = first
    while page < last:
        end = page + 1
        if words[page] & HUGE != 0:
            page &= ~(FOLIO - 1)
            end = min(page + FOLIO, words.shape[0])
        notify(m, i, kind, WHY_SPLIT, page, end, times)
        page = end


@jit
def _step_on_range(m: Machine, i: int, step: int, first: int, last: int) -> None:
    kind, times = step & KIND_MASK, step >> COUNT_SHIFT
    if kind == KIND_WRITE_PROTECT:
        write_protect(m, i, first, last, KEEP_NONE, GONE_HOST)
    elif kind == KIND_DROP:
        drop(m, i, first, last)
    elif (step >> SCOPE_SHIFT) & SCOPE_MASK == SCOPE_FOLIO:
        _folios(m, i, first, last, kind, times)
    else:
        notify(m, i, kind, why_of(vm_row(m, i).host_op, kind), first, last, times)


@jit
def _operate_on_range(m: Machine, i: int, op: int, first: int, last: int) -> None:
    """An operation that takes its range in one call: the steps one after the other, each on the pages it is for."""
    table = effect_table(m)
    words = host_page(m, i)
    for s in range(STEPS):
        current, start, found, split = 0, first, False, False
        before, row = HUGE, -1
        for page in range(first, last + 1):
            step = 0
            if page < last:
                if not _has_same_row(words[page], before):
                    row = _row(m, i, op, page)
                before = words[page]
                step = table[row >> 2, op, row & 3, s] if row >= 0 else 0
            if step != current:
                if current != 0 and (current >> SCOPE_SHIFT) & SCOPE_MASK != EDGES:
                    _step_on_range(m, i, current, start, page)
                elif current != 0 and not split:
                    split = True
                    _edges(m, i, first, last, current & KIND_MASK, current >> COUNT_SHIFT)
                current, start, found = step, page, True
        if not found:
            break
    page = first
    before, row = HUGE, -1
    while page < last:
        if not _has_same_row(words[page], before):
            row = _row(m, i, op, page)
        before = words[page]
        end = page + 1
        if row >= 4:
            end = min((page & ~(FOLIO - 1)) + FOLIO, last)
        if row >= 0:
            effect = table[row >> 2, op, row & 3, OUTCOME]
            if effect != 0:
                _change_pages(m, i, page, end, effect)
        page = end


@jit
def _can_collapse(m: Machine, i: int, first: int) -> bool:
    """khugepaged gives up at a page that is pinned or shared, or is not there (max_ptes_swap aside)."""
    words = host_page(m, i)
    if first + FOLIO > words.shape[0]:
        return False
    for n in range(first, first + FOLIO):
        if words[n] & (PIN_MASK | HOLE | SHARED | READ_ONLY_VMA) != 0 or words[n] & PRESENT == 0:
            return False
    return True


@jit
def _operate_on_folio(m: Machine, i: int, op: int, page: int, row: int) -> int:
    """Do the steps of an operation that takes page by page on *page*, or on its huge page. Return the page behind."""
    words = host_page(m, i)
    steps = effect_table(m)[row >> 2, op, row & 3]
    effect = steps[OUTCOME]
    first, last = page, page + 1
    if row >= 4 or op == _THP:
        first = page & ~(FOLIO - 1)
        last = min(first + FOLIO, words.shape[0])
    if op == _THP and steps[0] != 0 and not _can_collapse(m, i, first):
        return last
    single, points = row < 4 and op != _THP, False
    for s in range(STEPS):
        step = steps[s]
        kind, times = step & KIND_MASK, step >> COUNT_SHIFT
        scope = (step >> SCOPE_SHIFT) & SCOPE_MASK
        if scope == 0:
            break
        low, high = first, last
        if scope == SCOPE_PAGE:
            low, high, single = page, page + 1, True
        if kind == KIND_AGE:
            if age(m, i, low, high, times) != 0 and step & SPARE != 0:
                return last
        elif kind == KIND_SET_SPTE:
            points = True
        else:
            notify(m, i, kind, why_of(op, kind), low, high, times)
    if effect != 0:
        if single:
            _change_pages(m, i, page, page + 1, effect)
        else:
            _change_pages(m, i, first, last, effect)
    if points:
        repoint(m, i, page)
    return page + 1 if single else last


@jit
def _operate_on_pages(m: Machine, i: int, op: int, first: int, last: int) -> None:
    page = first
    while page < last:
        chosen = op
        if host_page(m, i)[page] & LAZY_FREE != 0 and op in (_RECLAIM, _PAGEOUT, _PAGEOUT_PART):
            chosen = _RECLAIM_LAZY
        row = _row(m, i, chosen, page)
        page = _operate_on_folio(m, i, chosen, page, row) if row >= 0 else page + 1


@jit
def operate(m: Machine, i: int, op: int, first: int, last: int) -> None:
    """Let the host do HostOp *op* to guest pages first..last-1 of lane *i*: every notifier call, stage 2, the pages."""
    words = host_page(m, i)
    vm_row(m, i).host_op = op
    if params(m, i).backing == _HUGETLB:
        # Half a hugetlb page cannot be unmapped, protected or discarded: such calls are refused, or rounded inwards.
        first = (first + FOLIO - 1) & ~(FOLIO - 1)
        last &= ~(FOLIO - 1)
    if first >= last or (vm_row(m, i).slots_locked != 0 and op in _SLOT_OPS):
        return  # RFC v5, patch 9: the ioctl fails (kvm.md H10)
    if effect_table(m)[0, op, 0, SPAN] != 0 or effect_table(m)[1, op, 0, SPAN] != 0:
        _operate_on_range(m, i, op, first, last)
    else:
        _operate_on_pages(m, i, op, first, last)
    for page in range(first & ~(FOLIO - 1), min((last + FOLIO - 1) & ~(FOLIO - 1), words.shape[0])):
        if words[page] & ROLE_MASK == ROLE_HOT << ROLE_SHIFT:
            cpu_touch(m, i, page, 0)  # a CPU's next walk faults it in again, long before the SPU's


# ---- memslots --------------------------------------------------------------------------------------------------------


@jit
def drop(m: Machine, i: int, first: int, last: int) -> None:
    """KVM unmaps pages first..last-1 itself, without a notifier: their memslot goes, or guest_memfd has a hole."""
    vm = vm_row(m, i)
    par = params(m, i)
    words = host_page(m, i)
    host_calls(m, i)[KIND_DROP] += 1
    before = vm.stage2_unmapped
    for page in range(first, last):
        gone = unmap_ipa(m, i, (par.ram_page0 + page) << 12)
        if gone == 0:
            continue
        vm.stage2_unmapped += 1
        start = page & ~(gone - 1)
        for n in range(start, start + gone):
            words[n] = taken(words[n], GONE_HOST)
    log_host(m, i, UNMAPPED, vm.host_op, first | ((last - first) << 32), vm.stage2_unmapped - before)
    first, last = first & ~(FOLIO - 1), (last + FOLIO - 1) & ~(FOLIO - 1)  # a block went as a whole
    invalidate_tlb(m, i, par.ram_page0 + first, par.ram_page0 + last)
