"""What must hold, each property with its source, and the compiled check of one step.

A property is broken in one or several *kinds* of ways: the explorer looks for the shortest trace of each kind, and of
each kind that the host has a part in, for each of the host's operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBLIMITR_E, PMBSR_S
from spepolicy.explore.acts import Aux, Taint
from spepolicy.explore.steps import buffer_page
from spepolicy.jit import jit
from spepolicy.machine.hostpage import FRAME, PIN_MASK
from spepolicy.machine.misbehave import STRAY
from spepolicy.machine.rows import host_page, params, tlb, truth_row, vcpu_row, vm_row, walk_row
from spepolicy.machine.spu import profiling_enabled
from spepolicy.machine.state import Hook, LostCause, Machine
from spepolicy.mmu.walker import STAGE2

Ints = NDArray[np.int64]

__all__ = ["KINDS", "PROPERTIES", "Kind", "Property", "broken"]


class Kind(IntEnum):
    """A way to break a property; bit 1 << value of what `broken` returns."""

    BLACKOUT = 0
    BLACKOUT_EDITED = 1
    BLACKOUT_HOST = 2
    CUT_RESUMED = 3
    SWITCHED_OFF = 4
    DROPPED = 5
    OUTSIDE = 6
    DIVERGED = 7
    EXTERNAL_ABORT = 8
    LEAK = 9
    OVER_LIMIT = 10
    REFUSED = 11
    PINNED_FAULT = 12
    STALE_PIN = 13
    IMPOSSIBLE_CLAIM = 14
    LIVELOCK = 15
    BLACKOUT_BUG = 17
    ADDED = 18  # by a plugin: spepolicy.explore.added
    PINS_LONG = 16  # no property: the explorer's own limit


@dataclass(frozen=True)
class Property:
    """One property: what must hold, and who says so."""

    name: str
    rule: str
    source: str
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class KindInfo:
    """How a kind of violation is told."""

    text: str
    by_host: bool = False  # one trace for each host operation


PROPERTIES: tuple[Property, ...] = (
    Property(
        "no_blackout",
        "a lawful guest on a quiet host has no blackout that bare metal does not have",
        "M. Rutland 25 Jul 2022, O. Upton 2 Aug 2022 (kvm.md G1, 1.2); DESIGN 5",
        (Kind.BLACKOUT, Kind.BLACKOUT_EDITED),
    ),
    Property(
        "no_host_blackout",
        "the host's memory management causes a lawful guest no blackout",
        "O. Upton 9 Aug 2022 (kvm.md 4.3: never the guest's fault)",
        (Kind.BLACKOUT_HOST,),
    ),
    Property(
        "no_bug_blackout",
        "a bug of KVM's pinning causes a lawful guest no blackout",
        "A. Elisei 9 Aug and 12 Sep 2022 (kvm.md 4.5); DESIGN 3, KVM's own bugs",
        (Kind.BLACKOUT_BUG,),
    ),
    Property(
        "no_silent_loss",
        "no record is lost without the guest being told",
        "A. Elisei 19 Apr and 27 Jul 2022 (kvm.md A1), spe.md rule 38 and 3.4",
        (Kind.CUT_RESUMED, Kind.SWITCHED_OFF, Kind.DROPPED),
    ),
    Property(
        "contained",
        "nothing is written outside the guest's buffer as its tables define it now or before its last lawful change",
        "W. Deacon 1 Aug 2022 (the impact is confined to the guest), kvm.md Q18",
        (Kind.OUTSIDE,),
    ),
    Property(
        "no_divergence",
        "what the SPU writes is what the VMM, migration and virtio see at that address",
        "kvm.md H8 (the event filter hazard)",
        (Kind.DIVERGED,),
    ),
    Property(
        "allowed_syndrome",
        "the guest sees no state that its SPE version forbids",
        "Arm ARM D17.8.4 (spe.md rule 42), O. Upton 9 Aug 2022 (kvm.md A7)",
        (Kind.EXTERNAL_ABORT,),
    ),
    Property(
        "pins_released",
        "every pin is released with the VM",
        "M. Zyngier, 2021 (kvm.md H11)",
        (Kind.LEAK,),
    ),
    Property(
        "memlock",
        "pinned pages never exceed RLIMIT_MEMLOCK",
        "W. Deacon 19 Apr 2022 (kvm.md G7, H12)",
        (Kind.OVER_LIMIT,),
    ),
    Property(
        "never_refused",
        "no session of a guest with one buffer at a time is refused for the memlock limit that holds one buffer",
        "A. Elisei 19 Apr 2022 (kvm.md G7: cycling buffers)",
        (Kind.REFUSED,),
    ),
    Property(
        "pinned_means_mapped",
        "a page that KVM holds pinned does not fault at stage 2",
        "A. Elisei 27 Jul and 10 Aug 2022 (kvm.md H1 to H4: notifiers fire on pinned pages)",
        (Kind.PINNED_FAULT,),
    ),
    Property(
        "pin_keeps_page",
        "the page that KVM holds pinned is the one that the VMM has at that address",
        "kvm.md H7 (MADV_DONTNEED, balloon, hole punch)",
        (Kind.STALE_PIN,),
    ),
    Property(
        "possible_claim",
        "the cause that the policy claims for a fault is one that can have been",
        "A. Elisei 9 Aug and 12 Sep 2022 (kvm.md 4.5)",
        (Kind.IMPOSSIBLE_CLAIM,),
    ),
    Property(
        "no_livelock",
        "no fault repeats for ever without a record being written or the guest being told",
        "kvm.md G5, G13",
        (Kind.LIVELOCK,),
    ),
)

KINDS: Mapping[Kind, KindInfo] = {
    Kind.BLACKOUT: KindInfo("profiling is wanted and off, and nobody but KVM has done anything"),
    Kind.BLACKOUT_EDITED: KindInfo(
        "profiling is wanted and off; the guest changed its tables while the buffer was enabled and profiling was off, "
        "as the Arm ARM allows"
    ),
    Kind.BLACKOUT_HOST: KindInfo("profiling is wanted and off, and the host took the page", by_host=True),
    Kind.BLACKOUT_BUG: KindInfo("profiling is wanted and off, because of KVM's bug"),
    Kind.CUT_RESUMED: KindInfo("a cut record (DL=1) stays in the buffer: KVM resumed and told nobody"),
    Kind.SWITCHED_OFF: KindInfo("the guest's driver switches SPE off, and without DL it tells perf nothing"),
    Kind.DROPPED: KindInfo("the sample that faulted is gone: KVM resumed and told nobody"),
    Kind.OUTSIDE: KindInfo("the SPU writes to memory that is not the guest's buffer", by_host=True),
    Kind.DIVERGED: KindInfo("the SPU writes to a page that the VMM's address no longer shows", by_host=True),
    Kind.EXTERNAL_ABORT: KindInfo("PMBSR_EL1 shows an external abort, which SPEv1p3 reports as SError only"),
    Kind.LEAK: KindInfo("the VM is gone and pins are left"),
    Kind.OVER_LIMIT: KindInfo("more pages are pinned than RLIMIT_MEMLOCK allows"),
    Kind.REFUSED: KindInfo("the guest's session is refused: pinning would exceed RLIMIT_MEMLOCK"),
    Kind.PINNED_FAULT: KindInfo("stage 2 fault on a pinned page", by_host=True),
    Kind.STALE_PIN: KindInfo("the host replaces the page behind a pin", by_host=True),
    Kind.IMPOSSIBLE_CLAIM: KindInfo("the policy claims a cause that nothing on this trace can have been"),
    Kind.LIVELOCK: KindInfo("the same fault comes again and again"),
}

assert {kind for p in PROPERTIES for kind in p.kinds} == set(KINDS)

_TAINT, _BLACK = int(Aux.TAINT), int(Aux.BLACK)
_BY_HOST, _EDITED, _UNLAWFUL = int(Taint.HOST), int(Taint.EDITED), int(Taint.UNLAWFUL)
_BUG, _MIGRATED = int(Taint.BUG), int(Taint.MIGRATED)
_NO_LIMIT, _ENDED = int(Taint.NO_LIMIT), int(Taint.ENDED)
_STAGE2_FAULT = int(Hook.STAGE2_FAULT)
_SPE_V1P3 = 4  # ID_AA64DFR0_EL1.PMSVer

_BUFFER_FULL, _RING_FULL = int(LostCause.BUFFER_FULL), int(LostCause.RING_FULL)
_STAGE1_FAULT, _GUEST_ERROR = int(LostCause.STAGE1_FAULT), int(LostCause.GUEST_ERROR)
_KVM_BUG = int(LostCause.STAGE2_KVM_BUG)
_HOST, _MIGRATION = int(LostCause.STAGE2_HOST), int(LostCause.STAGE2_MIGRATION)

_CAUSE_GUEST, _CAUSE_HOST, _CAUSE_BUG, _CAUSE_MIGRATION = 2, 3, 4, 5  # spepolicy.hookspecs.Cause

_bit = {kind: 1 << kind for kind in Kind}
_B_BLACKOUT, _B_EDITED, _B_HOST = _bit[Kind.BLACKOUT], _bit[Kind.BLACKOUT_EDITED], _bit[Kind.BLACKOUT_HOST]
_B_BUG = _bit[Kind.BLACKOUT_BUG]
_B_CUT, _B_OFF, _B_DROPPED = _bit[Kind.CUT_RESUMED], _bit[Kind.SWITCHED_OFF], _bit[Kind.DROPPED]
_B_OUTSIDE, _B_DIVERGED, _B_ABORT = _bit[Kind.OUTSIDE], _bit[Kind.DIVERGED], _bit[Kind.EXTERNAL_ABORT]
_B_LEAK, _B_LIMIT, _B_REFUSED = _bit[Kind.LEAK], _bit[Kind.OVER_LIMIT], _bit[Kind.REFUSED]
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
    if v.pmbsr & PMBSR_S == 0 and v.pmblimitr & PMBLIMITR_E != 0:
        return False
    return v.stop_cause not in (_BUFFER_FULL, _RING_FULL, _STAGE1_FAULT, _GUEST_ERROR)


@jit
def _blackout(m: Machine, i: int, k: int, taint: int) -> int:
    """Say what kind a blackout is that begins now. Where the host has acted, one that it is not the cause of is found
    on a shorter trace without it.
    """
    if taint & _UNLAWFUL != 0:
        return 0
    if vcpu_row(m, i, k).stop_cause in (_HOST, _MIGRATION):
        return _B_HOST
    if vcpu_row(m, i, k).stop_cause == _KVM_BUG:
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
    n = entry[0] - (v.buffer_va >> 12)
    if n < 0 or n >= par.buffer_pages:
        return _B_OUTSIDE
    # Without a TLBI the SPU may go on with what its TLB holds (spe.md rule 32).
    if entry[3] & STRAY == 0 and buffer_page(m, i, k, n) != page:
        return _B_OUTSIDE
    return 0


@jit
def _pinned_fault(m: Machine, i: int) -> int:
    """Tell whether the stage 2 fault of this step hit a page that KVM holds pinned."""
    par = params(m, i)
    w = walk_row(m, i)
    if w.status & STAGE2 == 0:
        return 0
    page = (w.address >> 12) - par.ram_page0
    if page < 0 or page >= par.ram_pages or host_page(m, i)[page] & PIN_MASK == 0:
        return 0
    return _B_PINNED


@jit
def _answer(m: Machine, i: int, k: int, taint: int) -> int:
    """Look at how the policy answered a stage 2 fault."""
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    found = 0
    if tr.resumed_cut != 0:
        found |= _B_CUT
    elif v.answered == 1:
        found |= _B_DROPPED
    claim = v.claim
    if (
        (claim == _CAUSE_HOST and taint & (_BY_HOST | _MIGRATED) == 0)
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
        if tr.stage2_faults != 0 and hook != _STAGE2_FAULT:  # where the policy has answered, its pins are new
            found |= _pinned_fault(m, i)
        if hook == _STAGE2_FAULT and vm.hook_vcpu == k:
            found |= _answer(m, i, k, taint)
    aux[_BLACK] = black
    return found


def property_of(kind: Kind) -> Property:
    """Return the property that *kind* breaks."""
    return next(p for p in PROPERTIES if kind in p.kinds)


def detail_of(kind: Kind, last_op: int, claim: int) -> int:
    """Return what tells apart traces of one kind that are all worth showing."""
    if KINDS[kind].by_host:
        return last_op
    return claim if kind is Kind.IMPOSSIBLE_CLAIM else 0
