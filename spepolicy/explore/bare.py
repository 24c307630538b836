"""A guest without a driver writes one register at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import (
    BSC_FULL,
    EC_OTHER,
    PMBLIMITR_E,
    PMBLIMITR_LIMIT,
    PMBSR_EC_SHIFT,
    PMSCR_E0SPE,
    PMSCR_E1SPE,
)
from spepolicy.explore.acts import Act
from spepolicy.jit import jit
from spepolicy.machine.guest import disabling_is_seen, enabled_hooks
from spepolicy.machine.kvm import access, look_at_event
from spepolicy.machine.linux_spe import clear_syndrome
from spepolicy.machine.misbehave import forge_event
from spepolicy.machine.rows import params, vcpu_row
from spepolicy.machine.shadow import read_limit, write_limit, write_pointer
from spepolicy.machine.spu import drain
from spepolicy.machine.state import Hook, Machine

Ints = NDArray[np.int64]

_WRITE_PMSCR = int(Act.WRITE_PMSCR)
_ENABLE = int(Act.ENABLE)
_DISABLE = int(Act.DISABLE)
_WRITE_PMBPTR = int(Act.WRITE_PMBPTR)
_CLEAR = int(Act.CLEAR_PMBSR)
_DRAIN = int(Act.DRAIN)
_NONE = int(Hook.NONE)
_BUFFER_DISABLED = int(Hook.BUFFER_DISABLED)
_PROFILING_DISABLED = int(Hook.PROFILING_DISABLED)
_BUFFER_STOPPING = int(Hook.BUFFER_STOPPING)


@jit
def bare(m: Machine, i: int, k: int, aux: Ints, event: Ints) -> int:
    """A guest without a driver writes one register at EL1, or drains."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    act = event[0]
    pms = act == _WRITE_PMSCR
    traps = par.trap_pms if pms else par.trap_pmb
    if act == _DRAIN:
        v.drain_due = 0
        drain(m, i, k)
        return _NONE
    if par.virtualized != 0 and traps != 0:
        # The access is an exit: KVM notices an event that its interrupt has not reported yet. The write comes again.
        hook = look_at_event(m, i, k)
        if hook != _NONE:
            return hook
    if pms:
        seen = event[1] == 0 and disabling_is_seen(par, v)
        v.drain_due = 1 if seen else (0 if event[1] != 0 else v.drain_due)
        v.pmscr = event[1]
        par.profile_user = event[1] & PMSCR_E0SPE
        par.profile_kernel = (event[1] & PMSCR_E1SPE) >> 1
        access(m, i, k, 0, 1)
        _set_wanted(par, v)
        return _PROFILING_DISABLED if seen else enabled_hooks(m, i, k, True)
    if act == _WRITE_PMBPTR:
        end = 0x1000 - 16 if event[2] != 0 else 0
        write_pointer(par, v, v.buffer_va + (event[1] << 12) + end)
        access(m, i, k, 1, 0)
        return _NONE
    hook = _write_control(m, i, k, event)
    _set_wanted(par, v)
    return hook


@jit
def _write_control(m: Machine, i: int, k: int, event: Ints) -> int:
    """A bare guest writes PMBLIMITR_EL1 or PMBSR_EL1."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    act = event[0]
    if act == _ENABLE:
        write_limit(par, v, (v.buffer_va + ((event[1] + 1) << 12)) | PMBLIMITR_E)
        access(m, i, k, 1, 0)
        return enabled_hooks(m, i, k, False)
    if act == _DISABLE:
        if par.own_buffer != 0 and v.pmblimitr & PMBLIMITR_E != 0:
            return _BUFFER_STOPPING  # as in guest._stopped: KVM copies first, and the write comes again
        write_limit(par, v, read_limit(par, v) & PMBLIMITR_LIMIT)
        access(m, i, k, 1, 0)
        if par.trap_pmb != 0 and (par.hooks >> _BUFFER_DISABLED) & 1 != 0:
            return _BUFFER_DISABLED
        return _NONE
    if act == _CLEAR:
        clear_syndrome(v)
        access(m, i, k, 1, 0)
        return enabled_hooks(m, i, k, False)
    forge_event(m, i, k, (EC_OTHER << PMBSR_EC_SHIFT) | BSC_FULL)
    return _NONE


@jit
def _set_wanted(par: Any, v: Any) -> None:
    """A bare guest wants what its registers say."""
    v.wanted = 1 if read_limit(par, v) & PMBLIMITR_E != 0 and v.pmscr != 0 else 0
