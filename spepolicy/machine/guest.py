"""The guest's program: phases, system calls, context switches, and how the SPE driver's code is woven into them.

The program's own timeline advances only while the program executes, so interrupts and driver code delay it but never
change it: two policies at one seed see the same program.
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import (
    PMBLIMITR_DISCARD,
    PMBLIMITR_E,
    PMBLIMITR_FM,
    PMBSR_S,
    PMSCR_E0SPE,
    PMSCR_E1SPE,
)
from spepolicy.jit import jit
from spepolicy.machine.blackout import close_window
from spepolicy.machine.draw import draw, scaled_exponential
from spepolicy.machine.kvm import look_at_event
from spepolicy.machine.linux_spe import (
    clear_syndrome,
    handle_interrupt,
    output_begin,
    renew_buffer,
    settle_records,
    start_sampling,
    stop_buffer,
    stop_sampling,
)
from spepolicy.machine.migration import gate
from spepolicy.machine.other_drivers import freebsd_interrupt
from spepolicy.machine.rows import (
    exponential,
    params,
    phase,
    roles,
    truth_row,
    vcpu_row,
    vm_row,
)
from spepolicy.machine.scenario import GuestDriver
from spepolicy.machine.shadow import read_limit
from spepolicy.machine.spu import drain
from spepolicy.machine.state import NEVER, Hook, Machine, Segment
from spepolicy.machine.trace import VIRQ, ZERO, log

_USER = int(Segment.USER)
_KERNEL = int(Segment.KERNEL)
_STOP = int(Segment.STOP)
_START = int(Segment.START)
_START_SAMPLING = int(Segment.START_SAMPLING)
_IRQ_ENTRY = int(Segment.IRQ_ENTRY)
_IRQ_HANDLER = int(Segment.IRQ_HANDLER)
_DONE = int(Segment.DONE)

_NONE = int(Hook.NONE)
_FREEBSD = int(GuestDriver.FREEBSD)
_BUFFER_ENABLED = int(Hook.BUFFER_ENABLED)
_PROFILING_ENABLED = int(Hook.PROFILING_ENABLED)
_BUFFER_DISABLED = int(Hook.BUFFER_DISABLED)
_BUFFER_STOPPING = int(Hook.BUFFER_STOPPING)
_BUFFER_ANNOUNCED = int(Hook.BUFFER_ANNOUNCED)
_USER_PROFILING_ARMED = int(Hook.USER_PROFILING_ARMED)
_PROFILING_DISABLED = int(Hook.PROFILING_DISABLED)
_ERET = int(Hook.ERET)

# Columns of Machine.phase.
_PHASE_USER, _PHASE_KERNEL, _PHASE_PS, _SYSCALL_GAP, _SYSCALL_PS = range(5)


@jit
def _program_draw(m: Machine, v: Any, mean_ps: int) -> int:
    v.program_draws += 1
    return scaled_exponential(exponential(m), draw(v.key_program, v.program_draws), mean_ps) + 1


@jit
def _enter(v: Any, segment: int, level: int, distribution: int, length_ps: int) -> None:
    if level == 0 and v.level == 1:
        v.eret_due = v.eret_trap
    v.segment = segment
    v.level = level
    v.distribution = distribution
    v.segment_ps = length_ps
    v.segment_end_ps = v.now_ps + length_ps


@jit
def _driver_code(m: Machine, v: Any, segment: int, length_ps: int) -> None:
    _enter(v, segment, 1, roles(m)[2], length_ps)


@jit
def boot(m: Machine, i: int, k: int) -> None:
    """The vCPU starts with the profiled task about to be scheduled in."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.task = 0
    v.phase = draw(v.key_program, 0) % par.phases
    v.phase_left_ps = _program_draw(m, v, phase(m)[v.phase, _PHASE_PS])
    v.syscall_left_ps = _program_draw(m, v, phase(m)[v.phase, _SYSCALL_GAP])
    v.switch_left_ps = NEVER if par.task_off_ps == 0 else _program_draw(m, v, par.task_on_ps)
    v.renew_next_ps = NEVER if par.renew_ps == 0 else _program_draw(m, v, par.renew_ps)
    v.event_active = 1
    v.resume_segment = -1
    _driver_code(m, v, _START, par.start_ps)
    v.hook_next = announce_buffer(m, i, k)


@jit
def announce_buffer(m: Machine, i: int, k: int) -> int:
    """A paravirtual driver calls KVM with the AUX ring that it has just mapped. Return the hook to call, or NONE."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    if par.virtualized == 0 or par.paravirtual == 0 or par.hidden != 0:
        return _NONE
    tr.announced += 1
    tr.traps += 1
    tr.trap_total_ps += par.trap_ps
    v.host_ps += par.trap_ps
    return _BUFFER_ANNOUNCED if (par.hooks >> _BUFFER_ANNOUNCED) & 1 != 0 else _NONE


@jit
def eret_trapped(m: Machine, i: int, k: int) -> bool:
    """Tell whether the vCPU has just returned to EL0 with the trap armed, and charge the trap."""
    v = vcpu_row(m, i, k)
    if v.eret_due == 0:
        return False
    v.eret_due = 0
    par = params(m, i)
    tr = truth_row(m, i, k)
    tr.eret_traps += 1
    tr.traps += 1
    tr.trap_total_ps += par.trap_ps
    v.host_ps += par.trap_ps
    return (par.hooks >> _ERET) & 1 != 0


@jit
def _next_program_segment(m: Machine, i: int, k: int) -> None:
    """Continue the program: at the end of a segment, or after a switch."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    while v.switch_left_ps <= 0:
        if par.session == 0 and v.task == 0:
            _leave_task(m, i, k)
            return
        if _switch(m, i, k):
            return
    if v.restart != 0 and (v.task == 0 or par.session == 1):
        _begin_restart(m, i, k)
        return
    if v.task == 0 and v.phase_left_ps <= 0:
        v.phase = (v.phase + 1) % par.phases
        v.phase_left_ps = _program_draw(m, v, phase(m)[v.phase, _PHASE_PS])
    if v.syscall_left_ps <= 0:
        length = _program_draw(m, v, phase(m)[v.phase, _SYSCALL_PS])
        v.syscall_left_ps = _program_draw(m, v, phase(m)[v.phase, _SYSCALL_GAP])
        distribution = phase(m)[v.phase, _PHASE_KERNEL] if v.task == 0 else roles(m)[1]
        _enter(v, _KERNEL, 1, distribution, length)
        return
    length = min(v.syscall_left_ps, v.switch_left_ps)
    if v.task == 0:
        length = min(length, v.phase_left_ps)
    _enter(v, _USER, 0, phase(m)[v.phase, _PHASE_USER] if v.task == 0 else roles(m)[0], length)


@jit
def _leave_task(m: Machine, i: int, k: int) -> None:
    """arm_spe_pmu_stop() on the way out: sampling off at once, the rest after the driver's instructions."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    close_window(m, i, k)
    v.wanted = 0
    if disabling_is_seen(par, v):
        # PMSCR_EL1=0 traps and KVM looks at it; the PSB CSYNC and DSB behind it come when it is done.
        v.drain_due = 1
        v.hook_next = _PROFILING_DISABLED
        _driver_code(m, v, _STOP, 0)
    else:
        _driver_code(m, v, _STOP, par.stop_ps)
    stop_sampling(m, i, k)


@jit
def disabling_is_seen(par: Any, v: Any) -> bool:
    """Tell whether the policy has to look at a write of PMSCR_EL1=0 now: it switches off what was on, and traps."""
    return (
        (par.hooks >> _PROFILING_DISABLED) & 1 != 0
        and par.trap_pms != 0
        and v.pmscr & (PMSCR_E0SPE | PMSCR_E1SPE) != 0
        and read_limit(par, v) & PMBLIMITR_E != 0
        and v.pmbsr & PMBSR_S == 0
    )


@jit
def _switch(m: Machine, i: int, k: int) -> bool:
    """Switch tasks. Return True if the driver's code comes first: arm_spe_pmu_start() for the profiled task."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.task = 1 - v.task
    v.switch_left_ps = _program_draw(m, v, par.task_on_ps if v.task == 0 else par.task_off_ps)
    if par.session == 0 and v.task == 0:
        v.restart = 0
        if v.event_active != 0:
            _driver_code(m, v, _START, par.start_ps)
            return True
        # A disabled event is not scheduled in; its user still waits for data.
        v.wanted = 1
    return False


@jit
def _begin_restart(m: Machine, i: int, k: int) -> None:
    """perf enabled the event again while its task runs: arm_spe_pmu_start() by an IPI."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.restart = 0
    _driver_code(m, v, _START, par.start_ps)


@jit
def interrupt_program(v: Any) -> None:
    """Put the program segment aside for an interrupt."""
    v.resume_segment = v.segment
    v.resume_left_ps = v.segment_end_ps - v.now_ps
    v.resume_level = v.level
    v.resume_distribution = v.distribution


@jit
def _resume_program(m: Machine, i: int, k: int) -> None:
    v = vcpu_row(m, i, k)
    if v.resume_segment < 0:
        _next_program_segment(m, i, k)
        return
    whole = v.resume_whole_ps
    _enter(v, v.resume_segment, v.resume_level, v.resume_distribution, v.resume_left_ps)
    v.segment_ps = whole
    v.resume_segment = -1


@jit
def take_virq(m: Machine, i: int, k: int) -> None:
    """The guest takes its PMBIRQ: exception entry."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.resume_whole_ps = v.segment_ps
    log(m, i, k, VIRQ, ZERO, ZERO, ZERO)
    interrupt_program(v)
    _driver_code(m, v, _IRQ_ENTRY, par.irq_entry_ps)


@jit
def interrupt_for_restart(m: Machine, i: int, k: int) -> None:
    """perf's IPI to start the event arrives while the program runs."""
    v = vcpu_row(m, i, k)
    v.resume_whole_ps = v.segment_ps
    interrupt_program(v)
    _begin_restart(m, i, k)


@jit
def enabled_hooks(m: Machine, i: int, k: int, by_pms: bool) -> int:
    """Return the hook for a write that may have enabled the buffer or profiling, if KVM sees the write and the policy
    listens.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    if vm_row(m, i).migration_gate != 0:
        gate(m, i, k)
    sees = par.trap_pms if by_pms else par.trap_pmb
    if par.virtualized == 0 or sees == 0 or read_limit(par, v) & PMBLIMITR_E == 0 or v.pmbsr & PMBSR_S != 0:
        return _NONE
    if read_limit(par, v) & PMBLIMITR_FM == PMBLIMITR_DISCARD:
        return _NONE  # nothing will be written (rule 23)
    profiling = _NONE
    if v.pmscr & PMSCR_E1SPE != 0:
        if (par.hooks >> _PROFILING_ENABLED) & 1 != 0:
            profiling = _PROFILING_ENABLED
    elif v.pmscr & PMSCR_E0SPE != 0 and (par.hooks >> _USER_PROFILING_ARMED) & 1 != 0:
        profiling = _USER_PROFILING_ARMED
    if not by_pms and (par.hooks >> _BUFFER_ENABLED) & 1 != 0:
        v.hook_next = profiling
        return _BUFFER_ENABLED
    return profiling


@jit
def segment_end(m: Machine, i: int, k: int) -> int:
    """The segment that the vCPU executed is over: do what comes at its end, begin the next. Return the hook to call, or
    NONE.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    segment = v.segment
    if segment <= _KERNEL:
        v.switch_left_ps -= v.segment_ps
        if v.task == 0:
            v.phase_left_ps -= v.segment_ps
        if segment == _USER:
            v.syscall_left_ps -= v.segment_ps
        if v.now_ps >= v.renew_next_ps and v.task == 0 and (v.event_active | v.session_over) != 0:
            return _renew(m, i, k)
        _next_program_segment(m, i, k)
        return _NONE
    if segment == _START:
        output_begin(m, i, k)
        if read_limit(par, v) & PMBLIMITR_E != 0:
            _driver_code(m, v, _START_SAMPLING, 0)
            return enabled_hooks(m, i, k, False)
        v.wanted = 1
        _resume_program(m, i, k)
        return _NONE
    if segment == _START_SAMPLING:
        hook = _NONE
        if v.eret_pending == 0:
            start_sampling(m, i, k)
            v.wanted = 1
            hook = enabled_hooks(m, i, k, True)
            if hook == _USER_PROFILING_ARMED:
                v.eret_pending = 1  # the ERET comes after what KVM does at the write
                v.segment_end_ps = v.now_ps
                return hook
        v.eret_pending = 0
        _resume_program(m, i, k)
        return hook
    if segment == _STOP and v.drain_due != 0:
        v.drain_due = 0
        drain(m, i, k)
        _driver_code(m, v, _STOP, par.stop_ps)
        return _NONE
    if segment == _STOP:
        return _stopped(m, i, k)
    if segment == _IRQ_ENTRY:
        was_enabled = read_limit(par, v) & PMBLIMITR_E != 0
        enabled = handle_interrupt(m, i, k) if par.driver != _FREEBSD else freebsd_interrupt(m, i, k)
        _driver_code(m, v, _IRQ_HANDLER, par.irq_handler_ps)
        if enabled:
            return enabled_hooks(m, i, k, False)
        return _disabled_hook(par, v, was_enabled)
    if v.restart != 0 and v.resume_segment >= 0 and (v.task == 0 or par.session == 1):
        _begin_restart(m, i, k)
        return _NONE
    _resume_program(m, i, k)
    return _NONE


@jit
def _renew(m: Machine, i: int, k: int) -> int:
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.renew_next_ps = v.now_ps + _program_draw(m, v, par.renew_ps)
    v.renew_due = 1
    _leave_task(m, i, k)
    return _NONE


@jit
def _disabled_hook(par: Any, v: Any, was_enabled: bool) -> int:
    """Return the hook for a write that may have cleared PMBLIMITR_EL1.E, if KVM sees it and the policy listens."""
    if not was_enabled or read_limit(par, v) & PMBLIMITR_E != 0:
        return _NONE
    return _BUFFER_DISABLED if par.trap_pmb != 0 and (par.hooks >> _BUFFER_DISABLED) & 1 != 0 else _NONE


@jit
def _stopped(m: Machine, i: int, k: int) -> int:
    """End of arm_spe_pmu_stop(): the buffer goes off, then the other task runs, or a new perf session begins."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    announced = _NONE
    if par.virtualized != 0 and par.trap_pmb != 0:
        # The first trapped access is an exit: KVM notices an event that its interrupt has not reported yet.
        hook = look_at_event(m, i, k)
        if hook != _NONE:
            v.segment_end_ps = v.now_ps
            return hook
    if par.own_buffer != 0 and v.pmblimitr & PMBLIMITR_E != 0:
        # The trap of the guest's write of PMBLIMITR_EL1.E=0: KVM has to copy before the guest reads PMBPTR_EL1.
        v.segment_end_ps = v.now_ps
        return _BUFFER_STOPPING
    was_enabled = read_limit(par, v) & PMBLIMITR_E != 0
    stop_buffer(m, i, k)
    if v.renew_due != 0:
        v.renew_due = 0
        clear_syndrome(v)
        renew_buffer(m, i, k)
        v.left_ops = 0
        _driver_code(m, v, _START, par.start_ps)
        announced = announce_buffer(m, i, k)
    elif not _switch(m, i, k):
        _next_program_segment(m, i, k)
    if _disabled_hook(par, v, was_enabled) != _NONE:
        v.hook_next = announced
        return _BUFFER_DISABLED
    return announced


@jit
def end_of_run(m: Machine, i: int, k: int) -> None:
    """Close the books of a vCPU: what is in the buffer counts as kept, what is in flight as in flight."""
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    close_window(m, i, k)
    tr.in_flight = v.flight
    settle_records(m, i, k, False)
    v.segment = _DONE
