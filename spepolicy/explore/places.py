"""Which pages the buffer of a vCPU has, and which ones an event hits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.explore.acts import Target
from spepolicy.jit import jit
from spepolicy.machine.layout import guest_page
from spepolicy.machine.misbehave import level2_entry
from spepolicy.machine.pagetables import va_leaf
from spepolicy.machine.rows import params, pool, vcpu_row
from spepolicy.machine.state import Machine
from spepolicy.mmu.walker import OA_MASK, VALID

Ints = NDArray[np.int64]

_FORMER = int(Target.FORMER)
_TABLE = int(Target.TABLE)


@jit
def buffer_page(m: Machine, i: int, k: int, n: int) -> int:
    """Return the guest page that stage 1 maps behind page *n* of vCPU *k*'s buffer, -1 if it is not mapped."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    slot, entry, _reads = va_leaf(m, i, v.buffer_va + (n << 12))
    if slot < 0 or pool(m, i)[slot, entry] & VALID == 0:
        return -1
    return ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - par.ram_page0


@jit
def opened(k: int) -> int:
    """Return the bit of Taint that says that perf has a session on vCPU *k*."""
    return 1 << (8 * k)


@jit
def generations(par: Any) -> int:
    """Return how many sets of buffer pages the guest's memory holds (see `layout.guest_page`)."""
    return (par.ram_pages - par.guest_tables) // (par.vcpus * par.buffer_pages)


@jit
def twin(par: Any, k: int, n: int, page: int) -> int:
    """Return the other one of the two pages that can stand behind page *n* of the buffer."""
    first = guest_page(par, k, 0, n)
    return guest_page(par, k, 1, n) if page == first else first


@jit
def target_page(m: Machine, i: int, k: int, target: int, n: int) -> int:
    """Return the guest page that a host operation hits, -1 if there is none."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    if target == _TABLE:
        return _table_page(m, i, v.buffer_va)
    page = buffer_page(m, i, k, n)
    if target == _FORMER:
        return -1 if page < 0 else twin(par, k, n, page)
    return page


@jit
def _table_page(m: Machine, i: int, va: int) -> int:
    """Return the guest page that holds the level 3 table of *va*, -1 if none does."""
    slot, entry = level2_entry(m, i, va)
    if slot < 0 or pool(m, i)[slot, entry] & VALID == 0:
        return -1
    return ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - params(m, i).ram_page0
