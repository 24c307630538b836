"""The event loop of one lane: vCPUs and host in the order of host time, up to the next point that needs the policy.

Each vCPU has its own guest time, which stands still while KVM or another task of the host has the core; guest time plus
`host_ps` is host time, in which the vCPUs of a lane and its host share their events. The SPU is brought up to a point
in time before anything else happens there, since it reads tables that others edit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import entry, jit
from spepolicy.machine.blackout import account
from spepolicy.machine.guest import boot, end_of_run, eret_trapped, interrupt_for_restart, segment_end, take_virq
from spepolicy.machine.host import host_event, is_out_of_reach, schedule_host
from spepolicy.machine.kvm import first_exits, ordinary_exit, take_interrupt
from spepolicy.machine.layout import build_memory
from spepolicy.machine.linux_spe import read_ring
from spepolicy.machine.migration import migration_event
from spepolicy.machine.misbehave import act_due, fire_armed, schedule_act
from spepolicy.machine.rows import op_ps, params, truth_row, vcpu_row, vm_row
from spepolicy.machine.spu import drain, hold_counter, profiling_enabled, run_counter, sample_until
from spepolicy.machine.state import NEVER, WINDOW_LOG, Hook, Machine, Segment
from spepolicy.machine.trace import HOOK, ZERO, log, log_state

_KERNEL = int(Segment.KERNEL)
_DONE = int(Segment.DONE)
_LOG_FULL = int(Hook.LOG_FULL)
_VM_CREATED = int(Hook.VM_CREATED)
_VM_DESTROYED = int(Hook.VM_DESTROYED)
_TIMER = int(Hook.TIMER)
_ERET = int(Hook.ERET)
_NONE = int(Hook.NONE)


@jit
def _next_time(m: Machine, i: int, k: int) -> int:
    """Return the guest time of vCPU *k*'s next event."""
    v = vcpu_row(m, i, k)
    if v.segment == _DONE or v.blocked != 0:
        return NEVER
    t = min(v.segment_end_ps, v.irq_ps, v.exit_next_ps, v.preempt_next_ps, v.reader_ps, params(m, i).duration_ps)
    t = min(t, v.act_next_ps)
    if v.timer_ps != NEVER:
        t = min(t, max(v.timer_ps - v.host_ps, v.now_ps))
    if v.virq != 0 and v.segment <= _KERNEL:
        t = v.now_ps
    return t


@jit
def _advance(m: Machine, i: int, k: int, until_ps: int) -> None:
    """Let vCPU *k* execute until *until_ps* (guest time) or until its SPU stops, whichever comes first."""
    v = vcpu_row(m, i, k)
    while v.now_ps < until_ps:
        begin = v.now_ps
        active = profiling_enabled(v)
        log_state(m, i, k, active)
        if active:
            rate_ps = op_ps(m)[v.distribution]
            run_counter(m, i, k, rate_ps)
            v.now_ps = sample_until(m, i, k, until_ps)
            elapsed_ps = v.population_ps + v.now_ps - begin
            members = elapsed_ps // rate_ps
            truth_row(m, i, k).population += members
            v.population_ps = elapsed_ps - members * rate_ps
        else:
            hold_counter(v, v.now_ps)
            if v.flight != 0:
                drain(m, i, k)
            v.now_ps = until_ps
        account(m, i, k, v.now_ps - begin, active)
        if v.irq_ps < until_ps:
            return


@jit
def _step(m: Machine, i: int, k: int, t: int) -> int:
    """Process the event of vCPU *k* that is due at its guest time *t*. Return the hook to call, or NONE."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    if v.virq != 0 and v.segment <= _KERNEL:
        take_virq(m, i, k)
        return _NONE
    if t == par.duration_ps:
        end_of_run(m, i, k)
        return _NONE
    if t == v.irq_ps:
        return take_interrupt(m, i, k)
    if t == v.segment_end_ps:
        ended = v.segment
        hook = segment_end(m, i, k)
        if v.act_armed != 0 and hook == _NONE:
            fire_armed(m, i, k, ended)
        return hook
    if v.timer_ps != NEVER and t >= v.timer_ps - v.host_ps:
        v.timer_ps = NEVER
        return _TIMER
    if t == v.reader_ps:
        read_ring(m, i, k)
        if v.restart != 0 and v.segment <= _KERNEL and (v.task == 0 or par.session == 1):
            interrupt_for_restart(m, i, k)
        return _NONE
    if t == v.act_next_ps:
        act_due(m, i, k)
        return _NONE
    return ordinary_exit(m, i, k, t == v.preempt_next_ps)


@jit
def _sync(m: Machine, i: int, host_ps: int) -> bool:
    """Bring every vCPU up to *host_ps* of host time. Return False if an SPU stopped before, so that its event may come
    first.
    """
    whole = True
    for k in range(params(m, i).vcpus):
        v = vcpu_row(m, i, k)
        until = host_ps - v.host_ps
        if v.segment != _DONE and v.now_ps < until and v.blocked == 0:
            _advance(m, i, k, until)
            if v.now_ps < until:
                whole = False
    return whole


@jit
def _wait(m: Machine, i: int, hook: int, k: int) -> None:
    vm = vm_row(m, i)
    vm.hook = hook
    vm.hook_vcpu = k
    if hook != _LOG_FULL:
        log(m, i, k, HOOK, hook, ZERO, ZERO)


@jit
def run_lane(m: Machine, i: int) -> None:
    """Run lane *i* until it needs the policy (`vm.hook`), its window log is full, or all of its vCPUs are done."""
    vm = vm_row(m, i)
    par = params(m, i)
    if vm.started == 0:
        vm.started = 1
        if (par.hooks >> _VM_CREATED) & 1 != 0:
            _wait(m, i, _VM_CREATED, 0)
            return
    while True:
        if vm.window_count > WINDOW_LOG:  # the array has room for four more windows of each vCPU
            _wait(m, i, _LOG_FULL, 0)
            return
        first = -1
        first_host = NEVER
        for k in range(par.vcpus):
            v = vcpu_row(m, i, k)
            if v.hook_next != 0:
                hook = v.hook_next
                v.hook_next = 0
                _wait(m, i, hook, k)
                return
            t = _next_time(m, i, k)
            if t < NEVER and t + v.host_ps < first_host:
                first_host = t + v.host_ps
                first = k
        if first < 0 and vm.blocked == 0:
            vm.finished = 1
            if (par.hooks >> _VM_DESTROYED) & 1 != 0 and vm.started == 1:
                vm.started = 2
                _wait(m, i, _VM_DESTROYED, 0)
            return
        while vm.host_next_ps <= min(first_host, vm.migration_next_ps) and is_out_of_reach(m, i):
            host_event(m, i)
        if vm.migration_next_ps <= min(first_host, vm.host_next_ps):
            if _sync(m, i, vm.migration_next_ps):
                hook = migration_event(m, i)
                if hook != _NONE:
                    _wait(m, i, hook, 0)
                    return
            continue
        if vm.host_next_ps <= first_host:
            if _sync(m, i, vm.host_next_ps):
                host_event(m, i)
            continue
        v = vcpu_row(m, i, first)
        t = first_host - v.host_ps
        if par.vcpus > 1 and not _sync(m, i, first_host):
            continue
        _advance(m, i, first, t)
        if v.now_ps < t:
            continue
        hook = _step(m, i, first, t)
        if eret_trapped(m, i, first):
            if hook == _NONE:
                hook = _ERET
            elif v.hook_next == _NONE:
                v.hook_next = _ERET
        if hook != _NONE:
            _wait(m, i, hook, first)
            return


@entry
def run_lanes(m: Machine, lanes: NDArray[np.int64]) -> None:
    """Run each of *lanes* (int64[n]) until it waits or is done."""
    for n in range(lanes.shape[0]):
        run_lane(m, lanes[n])


@entry
def start_lanes(m: Machine, lanes: NDArray[np.int64]) -> None:
    """Lay out memory and boot the vCPUs of each of *lanes* (int64[n]), whose parameters and keys are set."""
    for n in range(lanes.shape[0]):
        i = lanes[n]
        build_memory(m, i)
        vm = vm_row(m, i)
        par = params(m, i)
        if par.host_kind == 0:
            vm.host_next_ps = NEVER
        else:
            schedule_host(m, i)
        vm.migration_next_ps = NEVER if par.migration_kind == 0 else par.migration_start_ps
        for k in range(par.vcpus):
            boot(m, i, k)
            first_exits(m, i, k)
            schedule_act(m, i, k)
