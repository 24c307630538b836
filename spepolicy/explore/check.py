"""The compiled check of one step: which properties it broke (spepolicy.explore.properties)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBLIMITR_E, PMBSR_S
from spepolicy.explore.acts import Aux, FaultPage, Taint, Target
from spepolicy.explore.places import buffer_page, target_page
from spepolicy.explore.properties import Kind
from spepolicy.jit import jit
from spepolicy.machine.hostpage import FRAME, PIN_MASK, SKIPPED
from spepolicy.machine.rows import dirty, host_page, params, tlb, truth_row, vcpu_row, vm_row, walk_row
from spepolicy.machine.scenario import ABSENT
from spepolicy.machine.spu import profiling_enabled
from spepolicy.machine.state import STRAY, Hook, LostCause, Machine
from spepolicy.mmu.walker import STAGE2

Ints = NDArray[np.int64]

_TAINT, _BLACK, _FAULT = int(Aux.TAINT), int(Aux.BLACK), int(Aux.FAULT)
_HELD, _TABLE = int(Aux.HELD), int(Target.TABLE)
_PINNED, _LISTED, _ABSENT, _LET_GO = (int(bit) for bit in FaultPage)
_BY_HOST, _EDITED, _UNLAWFUL = int(Taint.HOST), int(Taint.EDITED), int(Taint.UNLAWFUL)
_BUG, _MIGRATED = int(Taint.BUG), int(Taint.MIGRATED)
_NO_LIMIT, _ENDED = int(Taint.NO_LIMIT), int(Taint.ENDED)
_STAGE2_FAULT = int(Hook.STAGE2_FAULT)
_SPE_V1P3 = 4  # ID_AA64DFR0_EL1.PMSVer

_BUFFER_FULL, _RING_FULL = int(LostCause.BUFFER_FULL), int(LostCause.RING_FULL)
_STAGE1_FAULT, _GUEST_ERROR = int(LostCause.STAGE1_FAULT), int(LostCause.GUEST_ERROR)
_KVM_BUG = int(LostCause.STAGE2_KVM_BUG)
_HOST, _MIGRATION = int(LostCause.STAGE2_HOST), int(LostCause.MIGRATION)
_STAGE2_MIGRATION = int(LostCause.STAGE2_MIGRATION)

# spepolicy.hookspecs.Cause
_CAUSE_NOT_PINNED, _CAUSE_GUEST, _CAUSE_HOST, _CAUSE_BUG, _CAUSE_MIGRATION = 1, 2, 3, 4, 5

_bit = {kind: 1 << kind for kind in Kind}
_B_BLACKOUT, _B_EDITED, _B_HOST = _bit[Kind.BLACKOUT], _bit[Kind.BLACKOUT_EDITED], _bit[Kind.BLACKOUT_HOST]
_B_BUG = _bit[Kind.BLACKOUT_BUG]
_B_CUT, _B_OFF, _B_DROPPED = _bit[Kind.CUT_RESUMED], _bit[Kind.SWITCHED_OFF], _bit[Kind.DROPPED]
_B_OUTSIDE, _B_DIVERGED, _B_ABORT = _bit[Kind.OUTSIDE], _bit[Kind.DIVERGED], _bit[Kind.EXTERNAL_ABORT]
_B_LEAK, _B_LIMIT, _B_REFUSED = _bit[Kind.LEAK], _bit[Kind.OVER_LIMIT], _bit[Kind.REFUSED]
_B_MIGRATION, _B_ABSENT, _B_UNLOGGED = _bit[Kind.BLACKOUT_MIGRATION], _bit[Kind.ABSENT_PAGE], _bit[Kind.UNLOGGED]
_B_DRAIN = _bit[Kind.DRAIN_FAULT]
_B_PINNED, _B_STALE, _B_CLAIM = _bit[Kind.PINNED_FAULT], _bit[Kind.STALE_PIN], _bit[Kind.IMPOSSIBLE_CLAIM]


@jit
def _is_black(m: Machine, i: int, k: int) -> bool:
    """Tell whether vCPU *k* is in a blackout, as `machine.blackout` books it, that virtualization is the reason of: not
    a full buffer, a full ring, or an error of the guest's own.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    selected = par.profile_kernel if v.level == 1 else par.profile_user
    if v.wanted == 0 or selected == 0 or profiling_enabled(v):
        return False
    if v.blocked != 0:
        return False  # it does not execute
    if v.pmbsr & PMBSR_S == 0 and v.pmblimitr & PMBLIMITR_E != 0 and v.spe_off == 0:
        return False
    return v.stop_cause not in (_BUFFER_FULL, _RING_FULL, _STAGE1_FAULT, _GUEST_ERROR)


@jit
def _blackout(m: Machine, i: int, k: int, taint: int) -> int:
    """Say what kind a blackout is that begins now. Where the host has acted, one that it is not the cause of is found
    on a shorter trace without it.
    """
    if taint & _UNLAWFUL != 0:
        return 0
    cause = vcpu_row(m, i, k).stop_cause
    if cause in (_STAGE2_MIGRATION, _MIGRATION):
        return _B_MIGRATION
    if cause == _HOST:
        return _B_HOST
    if cause == _KVM_BUG:
        return _B_BUG
    if taint & (_BY_HOST | _BUG | _MIGRATED) != 0:
        return 0
    return _B_EDITED if taint & _EDITED != 0 else _B_BLACKOUT


@jit
def _written(m: Machine, i: int, k: int) -> int:
    """Look where the records of this step went."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    entry = tlb(m, i, k)[v.tlb_page & par.tlb_mask]
    if v.tlb_page == -1 or par.own_buffer != 0:  # the SPU writes to KVM's own buffer
        return 0
    page = entry[2] - par.ram_page0
    if page < 0 or page >= par.ram_pages:
        return _B_OUTSIDE
    word = host_page(m, i)[page]
    if word & FRAME != entry[1]:
        # A pin keeps the old frame from being given away; without one it may be anybody's by now.
        return _B_DIVERGED if word & PIN_MASK != 0 else _B_OUTSIDE
    begin = v.buffer_base if par.physical != 0 else v.buffer_va  # of PMBPTR_EL1: an IPA with nVM, else a VA
    n = entry[0] - (begin >> 12)
    if n < 0 or n >= par.buffer_pages:
        return _B_OUTSIDE
    # Without a TLBI the SPU may go on with what its TLB holds (spe.md rule 32).
    if entry[3] & STRAY == 0 and buffer_page(m, i, k, n) != page:
        return _B_OUTSIDE
    return 0


@jit
def _place(m: Machine, i: int, k: int, page: int) -> int:
    """Return the bit of guest page *page* in a part of Aux.HELD: n for page n of the buffer, 15 for its table."""
    if target_page(m, i, k, _TABLE, 0) == page:
        return 1 << 15
    for n in range(params(m, i).buffer_pages):
        if buffer_page(m, i, k, n) == page:
            return 1 << n
    return 0


@jit
def _held(m: Machine, i: int, k: int) -> int:
    """Return which pages of vCPU *k*'s buffer, and its table, are pinned, as bits of `_place`."""
    words = host_page(m, i)
    found = 0
    for n in range(params(m, i).buffer_pages):
        page = buffer_page(m, i, k, n)
        if page >= 0 and words[page] & PIN_MASK != 0:
            found |= 1 << n
    table = target_page(m, i, k, _TABLE, 0)
    if table >= 0 and words[table] & PIN_MASK != 0:
        found |= 1 << 15
    return found


@jit
def note_fault(m: Machine, i: int, aux: Ints) -> None:
    """After an act, before the policy is asked: note what is true of the page that a stage 2 fault of it hit. Where two
    vCPUs have faulted, since both were stopped, the lane knows the walk of the last only: nothing is noted.
    """
    par = params(m, i)
    at = -1
    for k in range(par.vcpus):
        if vcpu_row(m, i, k).drain_due != 0 and (aux[_HELD] >> (16 * k)) & 0xFFFF == 0:
            aux[_HELD] |= _held(m, i, k) << (16 * k)
        if truth_row(m, i, k).stage2_faults != 0:
            if at >= 0:
                return
            at = k
    if at < 0:
        return
    w = walk_row(m, i)
    page = (w.address >> 12) - par.ram_page0
    if w.status & STAGE2 == 0 or page < 0 or page >= par.ram_pages:
        return
    word = host_page(m, i)[page]
    bits = _PINNED if word & PIN_MASK != 0 else 0
    bits |= _LISTED if word & SKIPPED != 0 else 0
    if par.migration_kind != 0 and dirty(m, i)[page] & ABSENT != 0:
        bits |= _ABSENT
    if bits & _PINNED == 0 and (aux[_HELD] >> (16 * at)) & _place(m, i, at, page) != 0:
        bits |= _LET_GO
    aux[_FAULT] = (aux[_FAULT] & ~(15 << (4 * at))) | (bits << (4 * at))


@jit
def _faulted(bits: int) -> int:
    """Return the kinds of violation that a fault on a page of such *bits* is."""
    found = 0
    if bits & _PINNED != 0:
        found |= _B_PINNED
    if bits & _ABSENT != 0:
        found |= _B_ABSENT
    if bits & _LET_GO != 0:
        found |= _B_DRAIN
    return found


@jit
def _answer(m: Machine, i: int, k: int, taint: int, bits: int) -> int:
    """Look at how the policy answered a stage 2 fault on a page of such FaultPage *bits*."""
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    found = 0
    if tr.resumed_cut != 0:
        found |= _B_CUT
    elif v.answered == 1:
        found |= _B_DROPPED
    claim = v.claim
    if (
        # "Not pinned yet" is what a page that KVM holds pinned, or believes to, cannot be.
        (claim == _CAUSE_NOT_PINNED and bits & (_PINNED | _LISTED) != 0)
        or (claim == _CAUSE_HOST and taint & (_BY_HOST | _MIGRATED) == 0)
        or (claim == _CAUSE_GUEST and taint & (_EDITED | _UNLAWFUL) == 0)
        or (claim == _CAUSE_BUG and taint & _BUG == 0)
        or (claim == _CAUSE_MIGRATION and taint & _MIGRATED == 0)
    ):
        found |= _B_CLAIM
    return found


@jit
def broken(m: Machine, i: int, aux: Ints, hook: int, spe_version: int) -> int:
    """Return the kinds of violation in lane *i* after a step, as bits. *hook* is the one that the step ended with; the
    lane's counters were zero before the step.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    taint = aux[_TAINT]
    found = 0
    if taint & _ENDED != 0:
        return _B_LEAK if vm.pinned_pages != 0 else 0
    if vm.pinned_pages > par.memlock_pages and taint & _NO_LIMIT == 0:
        found |= _B_LIMIT
    if vm.pin_refused != 0:
        found |= _B_REFUSED
    if vm.stale_pins != 0:
        found |= _B_STALE
    if vm.migration_unlogged != 0:
        found |= _B_UNLOGGED
    black = 0
    for k in range(par.vcpus):
        tr = truth_row(m, i, k)
        if _is_black(m, i, k):
            black |= 1 << k
            if (aux[_BLACK] >> k) & 1 == 0:
                found |= _blackout(m, i, k, taint)
        if tr.silent_fatal != 0 and vcpu_row(m, i, k).stop_cause not in (_STAGE1_FAULT, _GUEST_ERROR):
            found |= _B_OFF  # an error of the guest's own would be as silent on bare metal
        if tr.injected_external != 0 and spe_version >= _SPE_V1P3:
            found |= _B_ABORT
        if tr.written != 0:
            found |= _written(m, i, k)
        bits = (aux[_FAULT] >> (4 * k)) & 15
        if tr.stage2_faults != 0:
            found |= _faulted(bits)
        if hook == _STAGE2_FAULT and vm.hook_vcpu == k:
            found |= _answer(m, i, k, taint, bits)
        if bits != 0 and (vcpu_row(m, i, k).pmbsr & PMBSR_S == 0 or vcpu_row(m, i, k).event_seen != 0):
            aux[_FAULT] &= ~(15 << (4 * k))  # it is answered
        if vcpu_row(m, i, k).drain_due == 0:
            aux[_HELD] &= ~(0xFFFF << (16 * k))
    aux[_BLACK] = black
    return found
