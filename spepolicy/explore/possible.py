"""When each act can happen: what a state offers. Only what changes something is offered."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBLIMITR_E, PMBSR_S
from spepolicy.explore.acts import Act, Aux, Budget, Taint
from spepolicy.explore.migrate import is_still, migration_acts
from spepolicy.explore.places import buffer_page, opened, target_page
from spepolicy.jit import jit
from spepolicy.machine.effects import OUTCOME
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.hostpage import HOLE, HUGE, LOCKED, PIN_MASK
from spepolicy.machine.pagetables import va_leaf
from spepolicy.machine.rows import effect_table, host_page, params, pool, vcpu_row, vm_row
from spepolicy.machine.shadow import read_limit
from spepolicy.machine.spu import profiling_enabled
from spepolicy.machine.state import NEVER, Machine, Segment
from spepolicy.mmu.walker import S1_READ_ONLY, VALID

Ints = NDArray[np.int64]

_OPEN = int(Act.OPEN)
_DRIVER = int(Act.DRIVER)
_SYSCALL = int(Act.SYSCALL)
_ERET = int(Act.ERET)
_SWITCH_OUT = int(Act.SWITCH_OUT)
_SWITCH_IN = int(Act.SWITCH_IN)
_RENEW = int(Act.RENEW)
_VIRQ = int(Act.VIRQ)
_READ = int(Act.READ)
_MOVE = int(Act.MOVE_PAGE)
_UNMAP = int(Act.UNMAP_PAGE)
_PROTECT = int(Act.PROTECT_PAGE)
_FREE_TABLE = int(Act.FREE_TABLE)
_BALLOON = int(Act.BALLOON_TABLE)
_RESTORE = int(Act.RESTORE)
_WRITE_PMSCR = int(Act.WRITE_PMSCR)
_ENABLE = int(Act.ENABLE)
_DISABLE = int(Act.DISABLE)
_WRITE_PMBPTR = int(Act.WRITE_PMBPTR)
_CLEAR = int(Act.CLEAR_PMBSR)
_FORGE = int(Act.FORGE_PMBSR)
_DRAIN = int(Act.DRAIN)
_SELECT = int(Act.SELECT)
_WRITE = int(Act.WRITE)
_IRQ = int(Act.IRQ)
_EXIT = int(Act.EXIT)
_HOST = int(Act.HOST)
_TIMER = int(Act.TIMER)
_BUG = int(Act.BUG)
_TAINT = int(Aux.TAINT)
_OPS_DONE = int(Aux.OPS_DONE)
_SPENT = int(Aux.SPENT)
_UNBOUNDED = int(Budget.NONE)
_MIGRATE_START = int(Act.MIGRATE_START)
_ENDED = int(Taint.ENDED)
_DONTNEED = int(HostOp.DONTNEED)
_DIRTY_LOG = int(HostOp.DIRTY_LOG)
_KERNEL = int(Segment.KERNEL)
_START = int(Segment.START)
_DONE = int(Segment.DONE)
_EDIT_ACTS = sum(1 << act for act in (_MOVE, _UNMAP, _PROTECT, _FREE_TABLE, _BALLOON, _RESTORE))

# When guests may edit the translations of their buffer: values of `rules[EDITS]`.
EDITS_NEVER, EDITS_DISABLED, EDITS_OFF, EDITS_ANY = range(4)
# Words of `rules`: what of the configuration the steps need.
BARE, EDITS = range(2)
RULES = 2


@jit
def _edit_allowed(v: Any, rule: int) -> bool:
    """Tell whether the guest may edit its buffer's translations now: kvm.md G2 and G3."""
    if rule == EDITS_ANY:
        return True
    if rule == EDITS_OFF:
        return not profiling_enabled(v)
    return rule == EDITS_DISABLED and v.pmblimitr & PMBLIMITR_E == 0


@jit
def find_possible(
    m: Machine, i: int, aux: Ints, events: Ints, limits: Ints, rules: Ints, possible: NDArray[np.bool_]
) -> None:
    """Fill *possible* bool[events]: which of *events*, rows of (act, a, b, c, vCPU, budget), can happen in the state of
    lane *i*. *aux*: the Aux words of all lanes.
    """
    taint = aux[i, _TAINT]
    edits = rules[EDITS]
    migration = migration_acts(m, i) if taint & _ENDED == 0 else 0
    still = is_still(m, i)
    k = -1
    acts = 0
    for e in range(events.shape[0]):
        possible[e] = False
        budget = events[e, 5]
        if budget != _UNBOUNDED and aux[i, _SPENT + budget] >= limits[budget]:
            continue
        if events[e, 4] != k:
            k = events[e, 4]
            acts = _possible_acts(m, i, k, taint, rules[BARE], edits)
        act, a = events[e, 0], events[e, 1]
        if act >= _MIGRATE_START:
            possible[e] = (migration >> act) & 1 != 0
            continue
        if still or (acts >> act) & 1 == 0:
            continue
        if act == _HOST:
            can = (aux[i, _OPS_DONE] >> a) & 1 == 0 and _host_can(m, i, k, a, events[e, 2], events[e, 3])
        elif _MOVE <= act <= _RESTORE:
            can = _edit_can(m, i, k, act, a)
        elif act == _OPEN:
            can = _can_open(params(m, i), k, taint, a)
        else:
            can = act != _WRITE_PMSCR or vcpu_row(m, i, k).pmscr != a
        possible[e] = can


@jit
def _can_open(par: Any, k: int, taint: int, levels: int) -> bool:
    """Tell whether perf may open a session of *levels* on vCPU *k*: one event has the same on all vCPUs."""
    others = taint & (opened(0) | opened(1)) & ~opened(k)
    return others == 0 or levels == par.profile_user | (par.profile_kernel << 1)


@jit
def _host_can(m: Machine, i: int, k: int, op: int, target: int, n: int) -> bool:
    """Tell whether a host operation would do anything to the page."""
    page = target_page(m, i, k, target, n)
    if page < 0 or (vm_row(m, i).guest_memfd != 0 and op not in (_DONTNEED, _DIRTY_LOG)):
        return False  # the host's memory management does not touch a guest_memfd: host.host_event
    word = host_page(m, i)[page]
    if word & HOLE != 0:
        return False
    state = (2 if word & PIN_MASK != 0 else 0) + (1 if word & LOCKED != 0 else vm_row(m, i).locked)
    columns = effect_table(m)[1 if word & HUGE != 0 else 0, op, state]
    return columns[0] != 0 or columns[OUTCOME] != 0


@jit
def _possible_acts(m: Machine, i: int, k: int, taint: int, bare: int, edits: int) -> int:
    """Return the acts that vCPU *k* can see next, as bits, whatever their arguments."""
    v = vcpu_row(m, i, k)
    if taint & _ENDED != 0:
        return 0
    acts = 1 << _HOST
    if v.blocked != 0:
        return acts  # the VMM holds the vCPU
    if profiling_enabled(v):
        acts |= (1 << _WRITE) | (0 if v.flight != 0 else 1 << _SELECT)
    if v.irq_ps != NEVER:
        acts |= 1 << _IRQ
    if v.flight != 0 or (v.pmbsr & PMBSR_S != 0 and v.event_seen == 0):
        acts |= 1 << _EXIT  # else an exit changes nothing: it drains no record, and shows KVM no event
    if v.reader_ps != NEVER:
        acts |= 1 << _READ
    if v.timer_ps != NEVER:
        acts |= 1 << _TIMER
    if params(m, i).bug != 0 and params(m, i).bug_rate_q16 == 0:
        acts |= 1 << _BUG
    if v.segment > _KERNEL:
        if v.segment == _START and taint & opened(k) == 0:
            acts |= 1 << _OPEN
        elif v.segment != _DONE:
            acts |= 1 << _DRIVER
        return acts
    if v.virq != 0 and bare == 0:
        return acts | (1 << _VIRQ)  # interrupts are not masked in the program: it comes first
    if v.task != 0:
        return acts | (1 << _SWITCH_IN)
    acts |= (1 << _SWITCH_OUT) | (1 << _ERET if v.segment == _KERNEL else 1 << _SYSCALL)
    if v.event_active != 0 and _whole(m, i, k):
        acts |= 1 << _RENEW
    if v.segment == _KERNEL:
        if _edit_allowed(v, edits):
            acts |= _EDIT_ACTS
        if bare != 0:
            acts |= _bare_acts(m, i, k)
    return acts


@jit
def _bare_acts(m: Machine, i: int, k: int) -> int:
    """Return which registers a guest without a driver may write at EL1."""
    v = vcpu_row(m, i, k)
    acts = 1 << _WRITE_PMSCR
    stopped = v.pmbsr & PMBSR_S != 0
    enabled = read_limit(params(m, i), v) & PMBLIMITR_E != 0
    if enabled:
        acts |= (1 << _DISABLE) | (1 << _DRAIN if v.flight != 0 else 0)
    if not enabled or stopped:
        # PMBPTR_EL1 and LIMIT may be written only while the buffer is disabled or stopped (spe.md 1.6).
        acts |= (1 << _ENABLE) | (1 << _WRITE_PMBPTR)
    if v.guest_pmbsr != 0 or v.pmbsr != 0:
        acts |= 1 << _CLEAR
    if not stopped and params(m, i).virtualized != 0:
        acts |= 1 << _FORGE
    return acts


@jit
def _whole(m: Machine, i: int, k: int) -> bool:
    """Tell whether the guest maps every page of its buffer."""
    for n in range(params(m, i).buffer_pages):  # noqa: SIM110 - compiled code has no generators
        if buffer_page(m, i, k, n) < 0:
            return False
    return True


@jit
def _edit_can(m: Machine, i: int, k: int, act: int, n: int) -> bool:
    """Tell whether an edit, of page *n* of the buffer or of its table, would change a translation."""
    v = vcpu_row(m, i, k)
    slot, entry, _reads = va_leaf(m, i, v.buffer_va + (n << 12))
    if act == _RESTORE:
        return v.table_freed != 0 or not _whole(m, i, k) or _some_protected(m, i, k)
    if slot < 0:
        return False
    if act in (_FREE_TABLE, _BALLOON):
        return params(m, i).virtualized != 0 or act == _FREE_TABLE
    leaf = pool(m, i)[slot, entry]
    return leaf & VALID != 0 and (act != _PROTECT or leaf & S1_READ_ONLY == 0)


@jit
def _some_protected(m: Machine, i: int, k: int) -> bool:
    """Tell whether a page of the buffer is mapped read-only."""
    for n in range(params(m, i).buffer_pages):
        slot, entry, _reads = va_leaf(m, i, vcpu_row(m, i, k).buffer_va + (n << 12))
        if slot >= 0 and pool(m, i)[slot, entry] & S1_READ_ONLY != 0:
            return True
    return False
