"""How the SPU stops: buffer management events, faults, external aborts. Rules are numbered as in spe.md section 2."""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import (
    BSC_FULL,
    BSC_NOT_ALLOWED,
    EC_OTHER,
    EC_STAGE1,
    EC_STAGE2,
    FSC_EXTERNAL_ABORT,
    FSC_EXTERNAL_ABORT_ASYNC,
    FSC_EXTERNAL_ABORT_WALK,
    PMBLIMITR_LIMIT,
    PMBSR_COLL,
    PMBSR_DL,
    PMBSR_EA,
    PMBSR_EC_SHIFT,
    PMBSR_S,
)
from spepolicy.jit import jit
from spepolicy.machine.rows import lost, params, truth_row, vcpu_row, walk_row
from spepolicy.machine.scenario import ExternalAbort
from spepolicy.machine.state import LostCause, Machine
from spepolicy.machine.trace import ABORTED, LOST, STOPPED, ZERO, log_at
from spepolicy.mmu.walker import FSC_MASK, STAGE2

_STAGE1 = int(LostCause.STAGE1_FAULT)
_NOT_PINNED = int(LostCause.STAGE2_NOT_PINNED)
_GUEST = int(LostCause.STAGE2_GUEST)
_HOST = int(LostCause.STAGE2_HOST)
_FULL = int(LostCause.BUFFER_FULL)
_MIGRATION = int(LostCause.STAGE2_MIGRATION)
_GUEST_ERROR = int(LostCause.GUEST_ERROR)
_KVM_BUG = int(LostCause.STAGE2_KVM_BUG)
_SERROR = int(ExternalAbort.SERROR)
_MMU_FAULT = int(ExternalAbort.MMU_FAULT)
_SYNCHRONOUS = int(ExternalAbort.SYNCHRONOUS)

# True causes as spepolicy.hookspecs.Cause numbers them.
CAUSE_NOT_PINNED = 1
CAUSE_GUEST = 2
CAUSE_HOST = 3
CAUSE_KVM_BUG = 4
CAUSE_MIGRATION = 5


@jit
def hold_counter(v: Any, at_ps: int) -> None:
    """Profiling is no longer enabled: the interval counter keeps what is left (rule 13)."""
    if v.counting != 0:
        v.left_ops = max((v.select_ps - at_ps + v.rate_ps - 1) // v.rate_ps, 1)
        v.counting = 0


@jit
def stop(m: Machine, i: int, k: int, syndrome: int, at_ps: int, cause: int) -> None:
    """A buffer management event: S=1, profiling stops, PMBIRQ is on its way (rules 37, 38, 46)."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.pmbsr = (v.pmbsr & (PMBSR_COLL | PMBSR_DL)) | PMBSR_S | syndrome
    v.stop_ps = at_ps
    v.stop_cause = cause
    v.event_seen = 0
    v.irq_ps = at_ps + par.irq_latency_ps
    v.late_syndrome = 0
    hold_counter(v, at_ps)
    log_at(m, i, k, at_ps, STOPPED, cause, v.pmbsr, v.pmbptr)


@jit
def lose(m: Machine, i: int, k: int, cause: int, address: int, page: int, at_ps: int) -> None:
    """The record of the operation that is done will never be written.

    page: for a stage 2 fault the guest page that stage 2 lacks plus 1, for the log; else 0.
    """
    lost(m, i, k)[cause] += 1
    log_at(m, i, k, at_ps, LOST, cause, address, page)


@jit
def fault(m: Machine, i: int, k: int, status: int, address: int, cut: int, at_ps: int) -> bool:
    """An MMU fault on a buffer write: the sample is lost, PMBPTR is the faulting address (rules 38 to 40).

    Return True if that stopped the SPU, False if the fault will be reported later, as SPEv1p5 permits.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.pmbptr = address
    syndrome = status & FSC_MASK
    if status & STAGE2 != 0:
        syndrome |= EC_STAGE2 << PMBSR_EC_SHIFT
        cause = _HOST
        if tr.fault_cause == CAUSE_NOT_PINNED:
            cause = _NOT_PINNED
        elif tr.fault_cause == CAUSE_GUEST:
            cause = _GUEST
        elif tr.fault_cause == CAUSE_MIGRATION:
            cause = _MIGRATION
        elif tr.fault_cause == CAUSE_KVM_BUG:
            cause = _KVM_BUG
        tr.stage2_faults += 1
    else:
        syndrome |= EC_STAGE1 << PMBSR_EC_SHIFT
        cause = _STAGE1
        tr.stage1_faults += 1
    if cut != 0 or par.data_loss_at_boundary != 0:
        syndrome |= PMBSR_DL
        tr.data_loss += 1
    tr.fault_loss_cause = cause
    page = (walk_row(m, i).address >> 12) - par.ram_page0 + 1 if status & STAGE2 != 0 else ZERO
    lose(m, i, k, cause, address, page, at_ps)
    if status & STAGE2 != 0 and tr.stage2_faults == 1:
        tr.first_fault_ps = at_ps + v.host_ps
        tr.first_fault_va = address
        tr.first_fault_syndrome = (v.pmbsr & (PMBSR_COLL | PMBSR_DL)) | PMBSR_S | syndrome
    if par.late_fault_samples > 0:
        v.late_syndrome = syndrome
        v.late_left = par.late_fault_samples
        v.stop_cause = cause
        return False
    stop(m, i, k, syndrome, at_ps, cause)
    return True


@jit
def lose_behind_fault(m: Machine, i: int, k: int, at_ps: int) -> bool:
    """A sample is done after a fault that is not reported yet: it is lost, too. Return True if the fault is reported
    with it.
    """
    v = vcpu_row(m, i, k)
    lose(m, i, k, v.stop_cause, v.pmbptr, ZERO, at_ps)
    v.late_left -= 1
    if v.late_left > 0:
        return False
    stop(m, i, k, v.late_syndrome, at_ps, v.stop_cause)
    return True


@jit
def external_abort(m: Machine, i: int, k: int, cause: int, address: int, end: int, cut: int, at_ps: int) -> bool:
    """The memory system refuses the write at *address* of a record that ends before *end* (rule 42). Return True if
    that stopped the SPU.

    cut: 1 if *address* is not the first byte of the record. Reported to the SPU with S=1 already, an abort would leave
    all but EA and DL alone (rule 43); a stopped SPU does not write, so that does not arise.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    tr.external_aborts += 1
    log_at(m, i, k, at_ps, ABORTED, par.external_abort, address, ZERO)
    lose(m, i, k, cause, address, ZERO, at_ps)
    if par.external_abort < _MMU_FAULT:
        # Nobody tells the SPU: it goes on behind bytes that were never written.
        v.pmbptr = end
        if par.external_abort == _SERROR:
            tr.serrors += 1
        if end <= (v.pmblimitr & PMBLIMITR_LIMIT) - par.max_record_bytes:
            return False
        tr.buffer_full += 1
        stop(m, i, k, (EC_OTHER << PMBSR_EC_SHIFT) | BSC_FULL, at_ps, _FULL)
        return True
    v.pmbptr = address
    syndrome = PMBSR_DL if cut != 0 else ZERO
    if par.external_abort == _MMU_FAULT:
        # Level 3 of stage 2 in a VM, else of stage 1: the walk that every write to a new page ends with.
        syndrome |= FSC_EXTERNAL_ABORT_WALK | 3
        if par.virtualized != 0:
            syndrome |= EC_STAGE2 << PMBSR_EC_SHIFT
            tr.stage2_faults += 1
            tr.fault_cause = CAUSE_HOST
            tr.fault_loss_cause = cause
        else:
            syndrome |= EC_STAGE1 << PMBSR_EC_SHIFT
            tr.stage1_faults += 1
    elif par.external_abort == _SYNCHRONOUS:
        syndrome |= (EC_STAGE1 << PMBSR_EC_SHIFT) | FSC_EXTERNAL_ABORT | PMBSR_EA
    else:
        v.pmbptr = end
        syndrome |= (EC_STAGE1 << PMBSR_EC_SHIFT) | FSC_EXTERNAL_ABORT_ASYNC | PMBSR_EA | PMBSR_DL
    if syndrome & PMBSR_DL != 0:
        tr.data_loss += 1
    stop(m, i, k, syndrome, at_ps, cause)
    return True


@jit
def not_allowed(m: Machine, i: int, k: int, at_ps: int) -> None:
    """PMBPTR_EL1 leaves no room for a record below the limit, which software must not program: of what rule 34 allows,
    this SPU chooses the event "access not allowed" (rule 41).
    """
    tr = truth_row(m, i, k)
    tr.data_loss += 1
    lose(m, i, k, _GUEST_ERROR, vcpu_row(m, i, k).pmbptr, ZERO, at_ps)
    stop(m, i, k, (EC_OTHER << PMBSR_EC_SHIFT) | BSC_NOT_ALLOWED | PMBSR_DL, at_ps, _GUEST_ERROR)
