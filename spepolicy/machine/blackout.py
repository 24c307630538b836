"""Accounting of guest time: wanted, active, and blackout windows with their causes.

*Wanted* is guest time in which a perf session is open for what executes and its exception level is selected. On an
undisturbed machine that is exactly when the registers, as the guest wrote them, enable profiling. After an event
that makes the driver switch SPE off while perf still believes that it runs, the registers say no and the user says yes;
the time counts as blackout of that event's cause, for it is what the user misses.
"""

from __future__ import annotations

from spepolicy.jit import jit
from spepolicy.machine.rows import (
    blackout_ps,
    exposure_ps,
    op_ps,
    params,
    truth_row,
    vcpu_row,
    vm_row,
    window_row,
)
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import BLACK, LIGHT, ZERO, log_at


@jit
def account(m: Machine, i: int, k: int, elapsed_ps: int, active: bool) -> None:
    """Book *elapsed_ps* of guest time that ends at now_ps, in which level, distribution and SPU state were constant."""
    v = vcpu_row(m, i, k)
    par = params(m, i)
    selected = par.profile_kernel if v.level == 1 else par.profile_user
    if v.wanted == 0 or selected == 0 or elapsed_ps <= 0:
        return
    tr = truth_row(m, i, k)
    ops = elapsed_ps // op_ps(m)[v.distribution]
    exposure_ps(m, i, k)[v.distribution] += elapsed_ps
    tr.wanted_ps += elapsed_ps
    tr.wanted_ops += ops
    if active:
        tr.active_ps += elapsed_ps
        if v.window_open != 0:
            _log_window(m, i, k, v.now_ps - elapsed_ps)
        return
    if v.window_open == 0:
        v.window_open = 1
        v.window_start_ps = v.now_ps - elapsed_ps
        v.window_start_host_ps = v.now_ps - elapsed_ps + v.host_ps
        v.window_cause = v.stop_cause
        v.window_ps = 0
        v.window_missed_ops = 0
        log_at(m, i, k, v.window_start_ps, BLACK, v.window_cause, ZERO, ZERO)
    v.window_ps += elapsed_ps
    v.window_missed_ops += ops
    tr.missed_ops += ops
    blackout_ps(m, i, k)[v.window_cause] += elapsed_ps


@jit
def _log_window(m: Machine, i: int, k: int, end_ps: int) -> None:
    vm = vm_row(m, i)
    v = vcpu_row(m, i, k)
    w = window_row(m, i, vm.window_count)
    w.vcpu = k
    w.start_ps = v.window_start_ps
    w.start_host_ps = v.window_start_host_ps
    w.host_length_ps = end_ps + v.host_ps - v.window_start_host_ps
    w.length_ps = v.window_ps
    w.missed_ops = v.window_missed_ops
    w.cause = v.window_cause
    vm.window_count += 1
    if v.reported != 0:
        truth_row(m, i, k).reported_ps += v.window_ps
        v.reported = 0
    log_at(m, i, k, end_ps, LIGHT, v.window_cause, v.window_ps, v.window_missed_ops)
    v.window_open = 0


@jit
def close_window(m: Machine, i: int, k: int) -> None:
    """Profiling is no longer wanted: a blackout that is open ends here."""
    v = vcpu_row(m, i, k)
    if v.window_open != 0:
        _log_window(m, i, k, v.now_ps)
