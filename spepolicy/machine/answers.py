"""What KVM can answer to a failure besides an event in PMBSR_EL1 (kvm.md 2.4: E3, E5 to E7, E10 to E12)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBSR_COLL, PMBSR_S
from spepolicy.jit import entry, jit
from spepolicy.machine.blackout import close_window
from spepolicy.machine.linux_spe import settle_records
from spepolicy.machine.rows import lost, params, truth_row, vcpu_row, vm_row
from spepolicy.machine.scenario import GuestDriver
from spepolicy.machine.state import NEVER, Machine, Segment

Ints = NDArray[np.int64]

# spepolicy.hookspecs.Failure
_SERROR, _DISABLE, _RUN_ERROR, _IGNORE, _COLLISION, _HOST_PANIC, _SIDEBAND = range(1, 8)
_DONE = int(Segment.DONE)
_WINDOWS = int(GuestDriver.WINDOWS)
DISABLED = 2  # of VCPU.spe_off: for good, not for the time of a migration


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
