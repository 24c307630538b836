"""What SPE drivers other than Linux's do when PMBIRQ comes, as far as their sources say.

FreeBSD: sys/arm64/spe/arm_spe_dev.c and arm_spe_backend.c (Arm, 2024), per CPU only. Buffer full: the other half of the
buffer, at once. Anything else: SPE goes off on this CPU, then on all of them, and user space is told that the session
is over. The half that was being written is not handed over. PMBSR_EL1.DL is looked at with a full buffer only, and only
tells user space that a record may be cut. Inferred: here the halves are Linux's ring, of which the driver fills at most
a half before a wakeup; the other CPUs are disabled without delay (the driver uses a task queue).

Windows: wperf-driver/spe.c of WindowsPerf (Arm, 2024), the only public driver. No interrupt handler: PMBIRQ is never
taken (`kvm.inject` leaves it masked), PMBSR_EL1 never read. A timer of 500 ms looks for a pointer at the limit and
switches SPE off, which has stopped by itself then. Whatever stopped the SPU, the profile ends there, and nobody is
told; what was written is copied out when the user stops. Inferred: that a driver of Microsoft's own would not differ.
"""

from __future__ import annotations

from spepolicy.arch.registers import BSC_FULL, EC_OTHER, PMBSR_DL, PMBSR_EC_MASK, PMBSR_EC_SHIFT
from spepolicy.jit import jit
from spepolicy.machine.kvm import access
from spepolicy.machine.linux_spe import (
    clear_syndrome,
    collect,
    interrupt_syndrome,
    output_begin,
    settle_records,
    stop_sampling,
)
from spepolicy.machine.rows import params, truth_row, vcpu_row
from spepolicy.machine.shadow import read_limit, write_limit
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import HANDLED, ONE, REG_PMBLIMITR, REG_PMBSR, REGISTER, TWO, ZERO, log


@jit
def freebsd_interrupt(m: Machine, i: int, k: int) -> bool:
    """arm_spe_intr(). Return True if it left the buffer enabled by its write to PMBSR_EL1."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    syndrome = interrupt_syndrome(m, i, k)
    if syndrome == 0:
        return False
    if (syndrome & PMBSR_EC_MASK) >> PMBSR_EC_SHIFT == EC_OTHER and syndrome & 0x3F == BSC_FULL:
        access(m, i, k, 1, 0)  # PMBPTR_EL1
        collect(m, i, k, syndrome & ~PMBSR_DL)
        output_begin(m, i, k)
        if v.event_active == 0:
            stop_sampling(m, i, k)  # the other half is not copied out yet
    else:
        tr.fatal += 1  # and user space is told, whatever DL says
        for other in range(par.vcpus):
            end_session(m, i, other, v.stop_cause)
    clear_syndrome(v)
    log(m, i, k, REGISTER, REG_PMBSR, ZERO, ZERO)
    log(m, i, k, HANDLED, TWO if read_limit(par, v) == 0 else ONE, syndrome, ZERO)
    access(m, i, k, 1, 0)
    return read_limit(par, v) != 0


@jit
def end_session(m: Machine, i: int, k: int, cause: int) -> None:
    """arm_spe_disable() on one CPU after an error: what it has not handed over is gone."""
    v = vcpu_row(m, i, k)
    stop_sampling(m, i, k)
    write_limit(params(m, i), v, 0)
    log(m, i, k, REGISTER, REG_PMBLIMITR, ZERO, ZERO)
    access(m, i, k, 2, 0)
    settle_records(m, i, k, True)
    clear_syndrome(v)
    v.handle_open = 0
    v.event_active = 0
    v.restart = 0
    v.session_over = 1
    v.stop_cause = cause
