"""KVM apart from the policy: traps, world switches, the buffer management interrupt, and injection.

Host time is charged to the vCPU's `host_ps`; the guest does not execute meanwhile, so nothing of its program is missed
then.
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import EC_STAGE2, PMBLIMITR_E, PMBSR_EC_MASK, PMBSR_EC_SHIFT, PMBSR_S
from spepolicy.jit import jit
from spepolicy.machine.draw import draw, scaled_exponential
from spepolicy.machine.rows import exponential, params, truth_row, vcpu_row
from spepolicy.machine.scenario import GuestDriver
from spepolicy.machine.spu import drain
from spepolicy.machine.state import NEVER, Hook, Machine
from spepolicy.machine.trace import EXIT, INJECTED, INTERRUPT, ONE, TRAPPED, ZERO, log

_STAGE2_FAULT = int(Hook.STAGE2_FAULT)
_OWN_BUFFER_FULL = int(Hook.OWN_BUFFER_FULL)
_NONE = int(Hook.NONE)
_WINDOWS = int(GuestDriver.WINDOWS)  # its driver has no handler: PMBIRQ stays masked (other_drivers)


@jit
def charge(m: Machine, i: int, k: int, cost_ps: int) -> None:
    """A tool of the policy takes time of the host."""
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.host_ps += cost_ps
    tr.hook_total_ps += cost_ps


@jit
def access(m: Machine, i: int, k: int, pmb: int, pms: int) -> None:
    """The guest accesses *pmb* buffer and *pms* sampling registers; those that trap cost an exit each (spe.md 1.11)."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    trapped = pmb * par.trap_pmb + pms * par.trap_pms if v.spe_off == 0 else pmb + pms
    if trapped != 0:
        log(m, i, k, TRAPPED, trapped, pmb * par.trap_pmb, pms * par.trap_pms)
    tr.traps += trapped
    tr.trap_total_ps += trapped * par.trap_ps
    v.host_ps += trapped * par.trap_ps


@jit
def look_at_event(m: Machine, i: int, k: int) -> int:
    """On an exit: if the SPU has stopped since KVM looked last, take the event over (kvm.md 2.5, I3 and I4).

    A stage 2 fault is for the policy, if it has a handler; the rest is the guest's own business and is passed on.
    Return the hook to call, or NONE.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    if v.pmbsr & PMBSR_S == 0 or v.event_seen != 0:
        return _NONE
    v.event_seen = 1
    v.irq_ps = NEVER
    v.host_ps += par.event_ps
    tr.event_total_ps += par.event_ps
    if par.own_buffer != 0:
        v.answered = 0
        return _OWN_BUFFER_FULL
    if (v.pmbsr & PMBSR_EC_MASK) >> PMBSR_EC_SHIFT == EC_STAGE2 and (par.hooks >> _STAGE2_FAULT) & 1 != 0:
        v.answered = 0
        v.claim = -1
        return _STAGE2_FAULT
    inject(m, i, k, v.pmbsr)
    return _NONE


@jit
def inject(m: Machine, i: int, k: int, syndrome: int) -> None:
    """Let the guest read *syndrome* from PMBSR_EL1 and make its PMBIRQ pending."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    # The hardware stays stopped until the guest has dealt with it (kvm.md 2.5, I3).
    v.guest_pmbsr = syndrome
    v.pmbsr = syndrome | PMBSR_S
    v.virq = 1 if par.driver != _WINDOWS else 0
    log(m, i, k, INJECTED, ZERO, syndrome, ZERO)
    v.host_ps += par.inject_ps
    tr.event_total_ps += par.inject_ps


@jit
def take_interrupt(m: Machine, i: int, k: int) -> int:
    """The core takes PMBIRQ: at the guest itself on bare metal, by an exit in a VM."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.irq_ps = NEVER
    tr.irqs += 1
    log(m, i, k, INTERRUPT, par.virtualized, ZERO, ZERO)
    if par.virtualized == 0:
        v.event_seen = 1
        v.virq = 1 if par.driver != _WINDOWS else 0
        return _NONE
    if par.next_exit_only != 0:
        return _NONE
    v.host_ps += par.exit_ps + par.spe_switch_ps
    tr.event_total_ps += par.exit_ps + par.spe_switch_ps
    return look_at_event(m, i, k)


@jit
def ordinary_exit(m: Machine, i: int, k: int, preempted: bool) -> int:
    """An exit of other causes than SPE, or a preemption; with SPE in the guest each drains and switches its state."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    drain(m, i, k)
    cost = par.exit_ps
    if preempted:
        v.kvm_draws += 1
        cost += scaled_exponential(exponential(m), draw(v.key_kvm, v.kvm_draws), par.preempt_ps)
        v.preempt_next_ps = v.now_ps + _gap(m, v, par.preempt_interval_ps)
        tr.preemptions += 1
    else:
        v.exit_next_ps = v.now_ps + _gap(m, v, par.exit_interval_ps)
        tr.exits += 1
    log(m, i, k, EXIT, ONE if preempted else ZERO, cost, ZERO)
    v.host_ps += cost
    tr.other_host_ps += cost
    if v.pmblimitr & PMBLIMITR_E != 0:
        v.host_ps += par.spe_switch_ps
        tr.switch_total_ps += par.spe_switch_ps
    return look_at_event(m, i, k)


@jit
def _gap(m: Machine, v: Any, mean_ps: int) -> int:
    v.kvm_draws += 1
    return scaled_exponential(exponential(m), draw(v.key_kvm, v.kvm_draws), mean_ps) + 1


@jit
def first_exits(m: Machine, i: int, k: int) -> None:
    """Schedule the first exit and the first preemption of a vCPU."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.exit_next_ps = NEVER
    v.preempt_next_ps = NEVER
    if par.virtualized != 0 and par.exit_interval_ps > 0:
        v.exit_next_ps = _gap(m, v, par.exit_interval_ps)
    if par.virtualized != 0 and par.preempt_interval_ps > 0:
        v.preempt_next_ps = _gap(m, v, par.preempt_interval_ps)
