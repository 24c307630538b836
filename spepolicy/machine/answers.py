"""What a policy lets KVM answer: an event in PMBSR_EL1, going on as if nothing had happened, or one of the other
answers to a failure (kvm.md 2.4: E3, E5 to E7, E10 to E12); and what goes beside: a timer, an exit to the VMM.

`lanes` and `vcpus` are int64[n]. Policies use it through `spepolicy.batch`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import (
    BSC_FULL,
    BSC_TOO_LARGE,
    EC_IMPDEF,
    EC_STAGE1,
    FSC_EXTERNAL_ABORT,
    FSC_TRANSLATION,
    PMBSR_COLL,
    PMBSR_DL,
    PMBSR_EA,
    PMBSR_EC_SHIFT,
    PMBSR_S,
)
from spepolicy.jit import entry, jit
from spepolicy.machine.blackout import close_window
from spepolicy.machine.kvm import charge, inject
from spepolicy.machine.linux_spe import settle_records
from spepolicy.machine.rows import claims, lost, params, truth_row, vcpu_row, vm_row
from spepolicy.machine.scenario import GuestDriver
from spepolicy.machine.spu import hold_counter
from spepolicy.machine.state import NEVER, LostCause, Machine, Segment
from spepolicy.machine.trace import CLAIMED, RESUMED, ZERO, log
from spepolicy.mmu.walker import FSC_MASK

Ints = NDArray[np.int64]

# spepolicy.hookspecs.Event
_EVENT_STAGE1, _EVENT_STAGE2, _EVENT_EXTERNAL, _EVENT_IMPDEF, _EVENT_FULL, _EVENT_TOO_LARGE = range(1, 7)
# spepolicy.hookspecs.Failure
_SERROR, _DISABLE, _RUN_ERROR, _IGNORE, _COLLISION, _HOST_PANIC, _SIDEBAND = range(1, 8)
_REFUSED = int(LostCause.REFUSED)
_STAGE1_FAULT = int(LostCause.STAGE1_FAULT)
_DONE = int(Segment.DONE)
_WINDOWS = int(GuestDriver.WINDOWS)
DISABLED = 2  # of VCPU.spe_off: for good, not for the time of a migration


@entry
def tell_guest(m: Machine, lanes: Ints, vcpus: Ints, event: int, data_loss: int) -> None:
    """Inject a buffer management event. Where the SPU is not stopped yet, it is stopped first."""
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        v = vcpu_row(m, i, k)
        tr = truth_row(m, i, k)
        syndrome = v.pmbsr & (PMBSR_COLL | PMBSR_DL)
        if event == _EVENT_STAGE1:
            fault_status = v.walk_status & FSC_MASK if v.walk_status != 0 else FSC_TRANSLATION | 3
            syndrome |= (EC_STAGE1 << PMBSR_EC_SHIFT) | fault_status
            tr.injected_stage1 += 1
        elif event == _EVENT_STAGE2:
            syndrome = v.pmbsr
            tr.injected_stage2 += 1
        elif event == _EVENT_EXTERNAL:
            syndrome |= (EC_STAGE1 << PMBSR_EC_SHIFT) | FSC_EXTERNAL_ABORT | PMBSR_EA
            tr.injected_external += 1
        elif event == _EVENT_FULL:
            syndrome |= BSC_FULL
            tr.injected_full += 1
        elif event == _EVENT_TOO_LARGE:
            syndrome |= BSC_TOO_LARGE
            tr.injected_too_large += 1
        else:
            syndrome |= EC_IMPDEF << PMBSR_EC_SHIFT
            tr.injected_impdef += 1
        if data_loss != 0:
            if syndrome & PMBSR_DL == 0:
                tr.forged_loss += 1
            syndrome |= PMBSR_DL
        if v.pmbsr & PMBSR_S == 0:
            hold_counter(v, v.now_ps)
            v.stop_ps = v.now_ps
            v.stop_cause = _STAGE1_FAULT if event == _EVENT_STAGE1 else _REFUSED
            tr.refused += 1 if event != _EVENT_STAGE1 else 0
        v.event_seen = 1
        v.irq_ps = NEVER
        v.answered = 2
        inject(m, i, k, syndrome | PMBSR_S)


@entry
def resume(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """Clear PMBSR_EL1.S and go on at the same PMBPTR_EL1 (rule 45); the guest does not notice."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        tr = truth_row(m, lanes[n], vcpus[n])
        if v.pmbsr & PMBSR_DL != 0:
            tr.resumed_cut += 1
        log(m, lanes[n], vcpus[n], RESUMED, ZERO, v.pmbptr, ZERO)
        v.pmbsr &= PMBSR_COLL
        v.guest_pmbsr = 0
        v.event_seen = 0
        v.answered = 1


@jit
def end_vm(m: Machine, i: int, why: int) -> None:
    """The VM is gone: a panic of the guest's kernel at an SError, KVM_RUN's error, or the host's end. Nobody reads the
    buffers any more.
    """
    vm_row(m, i).died = why
    vm_row(m, i).blocked = 0
    for k in range(params(m, i).vcpus):
        v = vcpu_row(m, i, k)
        if v.segment == _DONE:
            continue
        close_window(m, i, k)
        if v.flight != 0:
            v.flight = 0
            lost(m, i, k)[v.stop_cause] += 1
        settle_records(m, i, k, True)
        v.hook_next = 0
        v.blocked = 0
        v.segment = _DONE


@jit
def _go_on(m: Machine, i: int, k: int, keep: int) -> None:
    """Clear PMBSR_EL1 but for *keep*: the SPU writes on from PMBPTR_EL1, the guest is not interrupted."""
    v = vcpu_row(m, i, k)
    v.pmbsr = (v.pmbsr & PMBSR_COLL) | keep
    v.guest_pmbsr = 0
    v.virq = 0
    v.irq_ps = NEVER
    v.event_seen = 0


@entry
def answer(m: Machine, lanes: Ints, vcpus: Ints, failure: int) -> None:
    """Give the answer *failure* (spepolicy.hookspecs.Failure) to each vCPU."""
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        v = vcpu_row(m, i, k)
        tr = truth_row(m, i, k)
        tr.answered_otherwise += 1
        v.answered = 1
        if failure in (_SERROR, _RUN_ERROR, _HOST_PANIC):
            end_vm(m, i, failure)
        elif failure == _DISABLE:
            v.spe_off = DISABLED
            _go_on(m, i, k, 0)
        elif failure == _IGNORE:
            v.guest_pmbsr = v.pmbsr
            v.pmbsr |= PMBSR_S
            v.virq = 1 if params(m, i).driver != _WINDOWS else 0
            v.irq_ps = NEVER
            v.event_seen = 1
        elif failure == _COLLISION:
            _go_on(m, i, k, PMBSR_COLL)
        else:
            v.reported = 1
            _go_on(m, i, k, 0)


@entry
def score_claims(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """After the policy answered stage 2 faults: note what it claimed against what was true."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        tr = truth_row(m, lanes[n], vcpus[n])
        claims(m, lanes[n])[max(v.claim, 0), tr.fault_cause] += 1
        log(m, lanes[n], vcpus[n], CLAIMED, max(v.claim, 0), tr.fault_cause, ZERO)


@entry
def set_timer(m: Machine, lanes: Ints, vcpus: Ints, delay_ps: Ints) -> None:
    """Let each vCPU's timer fire *delay_ps* of host time from now; below 0: never."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        v.timer_ps = v.now_ps + v.host_ps + delay_ps[n] if delay_ps[n] >= 0 else NEVER


@entry
def exit_to_vmm(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """KVM_RUN returns to the VMM, which does something and enters again."""
    for n in range(lanes.shape[0]):
        charge(m, lanes[n], vcpus[n], params(m, lanes[n]).vmm_exit_ps)
