"""The guest edits the translations of its buffer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBLIMITR_E
from spepolicy.explore.acts import Act, Aux, Taint
from spepolicy.explore.places import buffer_page, twin
from spepolicy.jit import jit
from spepolicy.machine.hostpage import cpu_touch
from spepolicy.machine.misbehave import balloon_table, blame_guest, change_leaf, free_table, restore_buffer, write_leaf
from spepolicy.machine.rows import params, vcpu_row
from spepolicy.machine.spu import profiling_enabled
from spepolicy.machine.state import Machine
from spepolicy.mmu.tables import S1_LEAF
from spepolicy.mmu.walker import S1_READ_ONLY, VALID

Ints = NDArray[np.int64]

_UNMAP = int(Act.UNMAP_PAGE)
_PROTECT = int(Act.PROTECT_PAGE)
_FREE_TABLE = int(Act.FREE_TABLE)
_BALLOON = int(Act.BALLOON_TABLE)
_RESTORE = int(Act.RESTORE)
_TAINT = int(Aux.TAINT)
_EDITED = int(Taint.EDITED)
_UNLAWFUL = int(Taint.UNLAWFUL)


@jit
def edit(m: Machine, i: int, k: int, aux: Ints, event: Ints) -> None:
    """The guest edits the translation of page a of its buffer, or of its table; with b=0 it leaves out the TLBI."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    act, n, invalidates = event[0], event[1], event[2]
    va = v.buffer_va + (n << 12)
    if act == _RESTORE:
        restore_buffer(m, i, k, 1)
        return
    if profiling_enabled(v) or invalidates == 0:
        aux[_TAINT] |= _UNLAWFUL  # kvm.md G3: not allowed while profiling is on; spe.md rule 32: and never without TLBI
    if v.pmblimitr & PMBLIMITR_E != 0:
        aux[_TAINT] |= _EDITED
    if act == _FREE_TABLE:
        free_table(m, i, k, va, invalidates)
    elif act == _BALLOON:
        balloon_table(m, i, k, va, invalidates)
    elif act == _PROTECT:
        change_leaf(m, i, va, 0, S1_READ_ONLY, invalidates)
    elif act == _UNMAP:
        change_leaf(m, i, va, VALID, 0, invalidates)
    else:
        page = twin(par, k, n, buffer_page(m, i, k, n))
        if par.virtualized != 0 and par.buffer_mapped != 0:
            cpu_touch(m, i, page, 1)
        elif par.virtualized != 0:
            blame_guest(m, i, k, page)
        write_leaf(m, i, va, ((par.ram_page0 + page) << 12) | S1_LEAF, invalidates)
