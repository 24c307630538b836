"""PMBPTR_EL1 and PMBLIMITR_EL1 as the guest writes and reads them: the hardware's, or KVM's shadows of them while KVM
owns the buffer (MDCR_EL2.E2PB=0b00, see `spepolicy.machine.own_buffer`).
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import PMBLIMITR_E
from spepolicy.jit import jit


@jit
def read_limit(par: Any, v: Any) -> int:
    """The guest reads PMBLIMITR_EL1: KVM's shadow of it while KVM owns the buffer."""
    return v.shadow_limit if par.own_buffer != 0 else v.pmblimitr


@jit
def write_limit(par: Any, v: Any, value: int) -> None:
    """The guest writes PMBLIMITR_EL1. While KVM owns the buffer the write traps, and E=0 stops KVM's buffer too."""
    if par.own_buffer == 0:
        v.pmblimitr = value
        return
    v.shadow_limit = value
    if value & PMBLIMITR_E == 0:
        v.pmblimitr = 0


@jit
def read_pointer(par: Any, v: Any) -> int:
    return v.shadow_ptr if par.own_buffer != 0 else v.pmbptr


@jit
def write_pointer(par: Any, v: Any, value: int) -> None:
    if par.own_buffer != 0:
        v.shadow_ptr = value
    else:
        v.pmbptr = value
