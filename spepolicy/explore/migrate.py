"""A live migration, step by step: the machine's own functions, where a simulation has clocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.explore.acts import Act, Aux, Taint
from spepolicy.jit import jit
from spepolicy.machine.migration import Phase, cancel, end_round, is_on, pages_arrive, resume_on_target, start
from spepolicy.machine.rows import params, vcpu_row, vm_row
from spepolicy.machine.scenario import Handling
from spepolicy.machine.state import Hook, Machine

Ints = NDArray[np.int64]

_START, _ROUND, _STOP = int(Act.MIGRATE_START), int(Act.MIGRATE_ROUND), int(Act.MIGRATE_STOP)
_RESUME, _ARRIVE, _CANCEL = int(Act.MIGRATE_RESUME), int(Act.MIGRATE_ARRIVE), int(Act.MIGRATE_CANCEL)
_WAITING, _ROUNDS, _STOPPED = int(Phase.WAITING), int(Phase.ROUNDS), int(Phase.STOPPED)
_ARRIVING, _CANCELLING, _OVER = int(Phase.ARRIVING), int(Phase.CANCELLING), int(Phase.OVER)
_REFUSE, _EXIT_ON_ENABLE = int(Handling.REFUSE), int(Handling.EXIT_ON_ENABLE)
_NONE, _STARTED, _FINISHED = int(Hook.NONE), int(Hook.MIGRATION_STARTED), int(Hook.MIGRATION_FINISHED)
_TAINT, _MIGRATED = int(Aux.TAINT), int(Taint.MIGRATED)
_NEVER_STOPS = 1 << 30  # rounds


@jit
def migration_acts(m: Machine, i: int) -> int:
    """Return the acts of a migration that can come next, as bits."""
    if params(m, i).migration_kind == 0:
        return 0
    phase = vm_row(m, i).migration_phase
    if phase == _WAITING:
        return 0 if _is_refused(m, i) else 1 << _START
    if phase == _ROUNDS:
        return (1 << _ROUND) | (1 << _STOP) | (1 << _CANCEL)
    if phase == _STOPPED:
        return 1 << _RESUME
    if phase == _ARRIVING:
        return 1 << _ARRIVE
    return 1 << _CANCEL if phase == _CANCELLING else 0


@jit
def _is_refused(m: Machine, i: int) -> bool:
    """Tell whether KVM refuses to turn the dirty log on now (M2, M3), which changes nothing."""
    par = params(m, i)
    if par.migration_handling not in (_REFUSE, _EXIT_ON_ENABLE):
        return False
    for k in range(par.vcpus):  # noqa: SIM110 - compiled code has no generators
        if is_on(vcpu_row(m, i, k), 1):
            return True
    return False


@jit
def is_still(m: Machine, i: int) -> bool:
    """Tell whether the vCPUs stand still until the migration's next step, which nothing else can come before."""
    phase = vm_row(m, i).migration_phase
    return phase in (_STOPPED, _CANCELLING)


@jit
def migrate(m: Machine, i: int, aux: Ints, act: int) -> int:
    """Do a step of the migration. Return the hook to call, or NONE."""
    vm = vm_row(m, i)
    par = params(m, i)
    hook = _NONE
    if act == _START:
        aux[_TAINT] |= _MIGRATED
        start(m, i)
        hook = _STARTED
    elif act in (_ROUND, _STOP):
        # What is left can always be sent within the permitted downtime: which of the two comes is the search's choice.
        par.migration_max_downtime_ps = -1
        par.migration_rounds = _NEVER_STOPS if act == _ROUND else 0
        end_round(m, i)
    elif act == _RESUME:
        resume_on_target(m, i)
        hook = _FINISHED
    elif act == _ARRIVE:
        pages_arrive(m, i)
    else:
        cancel(m, i)
        hook = _FINISHED
    _forget(vm)
    return hook if (par.hooks >> hook) & 1 != 0 and hook != _NONE else _NONE


@jit
def _forget(vm: Any) -> None:
    """Bring what only clocks need to one form: how many pages are under way, and in which round."""
    vm.migration_pages = 0
    vm.migration_round = 0
    if vm.migration_phase == _OVER:
        vm.migration_arrived = 0
