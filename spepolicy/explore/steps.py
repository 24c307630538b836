"""What each act does to a lane, and when it can happen: the machine's own rules, called without a clock.

Time stands still in an exploration: `now_ps` is 0, an interrupt or a reader that is due has the time 0, one that is not
has NEVER. Where `simulate` compares clocks to choose what comes next (the end of a system call, a context switch), the
act sets the clock that decides and calls the same function of the machine.
"""

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
    PMBSR_S,
    PMSCR_E0SPE,
    PMSCR_E1SPE,
)
from spepolicy.explore.acts import Act, Aux, Budget, Taint, Target
from spepolicy.jit import jit, widen
from spepolicy.machine.effects import OUTCOME
from spepolicy.machine.guest import enabled_hooks, eret_trapped, interrupt_for_restart, segment_end, take_virq
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.hostpage import HOLE, HUGE, LOCKED, PIN_MASK, cpu_touch
from spepolicy.machine.kvm import access, look_at_event, ordinary_exit, take_interrupt
from spepolicy.machine.layout import guest_page
from spepolicy.machine.linux_spe import clear_syndrome, read_ring, skip
from spepolicy.machine.misbehave import (
    balloon_table,
    blame_guest,
    change_leaf,
    forge_event,
    free_table,
    level2_entry,
    restore_buffer,
    write_leaf,
)
from spepolicy.machine.operations import operate
from spepolicy.machine.pagetables import va_leaf
from spepolicy.machine.rows import effect_table, host_page, outcome_type, params, pool, vcpu_row, vm_row
from spepolicy.machine.shadow import read_limit, write_limit, write_pointer
from spepolicy.machine.spu import complete, drain, profiling_enabled, record_bytes
from spepolicy.machine.state import NEVER, Hook, Machine, Segment
from spepolicy.mmu.tables import S1_LEAF
from spepolicy.mmu.walker import OA_MASK, S1_READ_ONLY, VALID

Ints = NDArray[np.int64]

_OPEN, _DRIVER, _SYSCALL, _ERET = int(Act.OPEN), int(Act.DRIVER), int(Act.SYSCALL), int(Act.ERET)
_SWITCH_OUT, _SWITCH_IN, _RENEW = int(Act.SWITCH_OUT), int(Act.SWITCH_IN), int(Act.RENEW)
_VIRQ, _READ = int(Act.VIRQ), int(Act.READ)
_MOVE, _UNMAP, _PROTECT = int(Act.MOVE_PAGE), int(Act.UNMAP_PAGE), int(Act.PROTECT_PAGE)
_FREE_TABLE, _BALLOON, _RESTORE = int(Act.FREE_TABLE), int(Act.BALLOON_TABLE), int(Act.RESTORE)
_WRITE_PMSCR, _ENABLE, _DISABLE = int(Act.WRITE_PMSCR), int(Act.ENABLE), int(Act.DISABLE)
_WRITE_PMBPTR, _CLEAR, _FORGE, _DRAIN = (
    int(Act.WRITE_PMBPTR), int(Act.CLEAR_PMBSR), int(Act.FORGE_PMBSR), int(Act.DRAIN),
)  # fmt: skip
_SELECT, _WRITE, _IRQ, _EXIT = int(Act.SELECT), int(Act.WRITE), int(Act.IRQ), int(Act.EXIT)
_HOST, _VM_END, _TIMER, _BUG = int(Act.HOST), int(Act.VM_END), int(Act.TIMER), int(Act.BUG)
_FORMER, _TABLE = int(Target.FORMER), int(Target.TABLE)

_TAINT, _LAST_OP, _OPS_DONE, _SPENT = int(Aux.TAINT), int(Aux.LAST_OP), int(Aux.OPS_DONE), int(Aux.SPENT)
_UNBOUNDED, _HOST_BUDGET = int(Budget.NONE), int(Budget.HOST)
_OPENED, _ENDED, _BY_HOST = int(Taint.OPENED), int(Taint.ENDED), int(Taint.HOST)
_BY_BUG = int(Taint.BUG)
_DONTNEED, _DIRTY_LOG = int(HostOp.DONTNEED), int(HostOp.DIRTY_LOG)
_EDITED, _UNLAWFUL = int(Taint.EDITED), int(Taint.UNLAWFUL)

_USER, _KERNEL = int(Segment.USER), int(Segment.KERNEL)
_START = int(Segment.START)
_DONE = int(Segment.DONE)

_NONE = int(Hook.NONE)
_BUFFER_DISABLED = int(Hook.BUFFER_DISABLED)
_BUFFER_STOPPING = int(Hook.BUFFER_STOPPING)
_VM_DESTROYED, _TIMER_HOOK, _ERET_HOOK = int(Hook.VM_DESTROYED), int(Hook.TIMER), int(Hook.ERET)

_EDIT_ACTS = sum(1 << act for act in (_MOVE, _UNMAP, _PROTECT, _FREE_TABLE, _BALLOON, _RESTORE))

# When guests may edit the translations of their buffer: values of `rules[EDITS]`.
EDITS_NEVER, EDITS_DISABLED, EDITS_OFF, EDITS_ANY = range(4)
# Words of `rules`: what of the configuration the steps need.
BARE, EDITS = range(2)
RULES = 2


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


@jit
def _edit_allowed(v: Any, rule: int) -> bool:
    """Tell whether the guest may edit its buffer's translations now: kvm.md G2 and G3."""
    if rule == EDITS_ANY:
        return True
    if rule == EDITS_OFF:
        return not profiling_enabled(v)
    return rule == EDITS_DISABLED and v.pmblimitr & PMBLIMITR_E == 0


@jit
def _next_record(m: Machine, par: Any, v: Any) -> int:
    """Return the size of the next record: every operation that explore samples has outcome 0."""
    return record_bytes(par, outcome_type(m)[v.flight_outcome] & 7)


@jit
def find_possible(
    m: Machine, i: int, aux: Ints, events: Ints, limits: Ints, rules: Ints, possible: NDArray[np.bool_]
) -> None:
    """Fill *possible* bool[events]: which of *events*, rows of (act, a, b, c, vCPU, budget), can happen in the state of
    lane *i*. *aux*: the Aux words of all lanes.
    """
    taint = aux[i, _TAINT]
    edits = rules[EDITS]
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
        if (acts >> act) & 1 == 0:
            continue
        if act == _HOST:
            can = (aux[i, _OPS_DONE] >> a) & 1 == 0 and _host_can(m, i, k, a, events[e, 2], events[e, 3])
        elif _MOVE <= act <= _RESTORE:
            can = _edit_can(m, i, k, act, a)
        else:
            can = act != _WRITE_PMSCR or vcpu_row(m, i, k).pmscr != a
        possible[e] = can


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
        if v.segment == _START and taint & _OPENED == 0:
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


@jit
def happen(m: Machine, i: int, aux: Ints, event: Ints) -> int:
    """Let *event*, which can happen, happen in lane *i*. Return the hook to call then, or NONE."""
    hook = _happen(m, i, aux, event)
    k = event[4]
    v = vcpu_row(m, i, k)
    if eret_trapped(m, i, k):  # as lane.run_lane has it
        if hook == _NONE:
            hook = _ERET_HOOK
        elif v.hook_next == _NONE:
            v.hook_next = _ERET_HOOK
    return hook


@jit
def _happen(m: Machine, i: int, aux: Ints, event: Ints) -> int:
    act, k = event[0], event[4]
    if event[5] != _UNBOUNDED:
        aux[_SPENT + event[5]] += 1
    if act == _HOST:
        page = target_page(m, i, k, event[2], event[3])
        aux[_TAINT] |= _BY_HOST
        aux[_LAST_OP] = event[1]
        aux[_OPS_DONE] |= 1 << event[1]
        operate(m, i, event[1], page, page + 1)
        return _NONE
    if act == _VM_END:
        aux[_TAINT] |= _ENDED
        return _VM_DESTROYED if (params(m, i).hooks >> _VM_DESTROYED) & 1 != 0 else _NONE
    if act == _TIMER:
        vcpu_row(m, i, k).timer_ps = widen(NEVER)
        return _TIMER_HOOK
    if act == _BUG:
        aux[_TAINT] |= _BY_BUG
        params(m, i).bug_rate_q16 = 1 << 16
        return _NONE
    if act >= _SELECT:
        return _hardware(m, i, k, act)
    if act <= _READ:
        return _linux(m, i, k, aux, event)
    if act <= _RESTORE:
        _edit(m, i, k, aux, event)
        return _NONE
    return _bare(m, i, k, aux, event)


@jit
def _hardware(m: Machine, i: int, k: int, act: int) -> int:
    v = vcpu_row(m, i, k)
    if act == _SELECT:
        v.flight = 1
        return _NONE
    if act == _IRQ:
        return take_interrupt(m, i, k)
    if act == _EXIT:
        return ordinary_exit(m, i, k, False)
    par = params(m, i)
    size = _next_record(m, par, v)
    offset = v.pmbptr & 0xFFF
    # The first record of a page, or one across its end, is written alone; in between, all that fit.
    several = size <= offset <= 0x1000 - size
    while True:
        v.flight = 1
        if complete(m, i, k, 0) or not several:
            return _NONE
        offset = v.pmbptr & 0xFFF
        if not size <= offset <= 0x1000 - size:
            return _NONE


@jit
def _linux(m: Machine, i: int, k: int, aux: Ints, event: Ints) -> int:
    """What the modelled Linux guest does next. The clocks that `simulate` would compare are set to choose it."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    act = event[0]
    if act == _VIRQ:
        take_virq(m, i, k)
        return _NONE
    if act == _READ:
        read_ring(m, i, k)
        if v.restart != 0 and v.segment <= _KERNEL and (v.task == 0 or par.session == 1):
            interrupt_for_restart(m, i, k)
        return _NONE
    if act == _OPEN:
        aux[_TAINT] |= _OPENED
        par.profile_user = event[1] & 1
        par.profile_kernel = event[1] >> 1
    elif act == _SYSCALL:
        v.syscall_left_ps = 0
    elif act in (_SWITCH_OUT, _SWITCH_IN):
        v.switch_left_ps = 0
    elif act == _RENEW:
        v.renew_next_ps = 0
    renewing = v.renew_due != 0
    if renewing and v.buffer_generation == 1:
        # The pages of sessions alternate between two sets: renew_buffer() has to come round to the first.
        v.buffer_generation = generations(par) - 1
    hook = segment_end(m, i, k)
    if renewing and v.renew_due == 0:
        aux[_TAINT] &= ~_OPENED
    return hook


@jit
def _edit(m: Machine, i: int, k: int, aux: Ints, event: Ints) -> None:
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


@jit
def _bare(m: Machine, i: int, k: int, aux: Ints, event: Ints) -> int:
    """A guest without a driver writes one register at EL1, or drains."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    act = event[0]
    pms = act == _WRITE_PMSCR
    traps = par.trap_pms if pms else par.trap_pmb
    if act == _DRAIN:
        drain(m, i, k)
        return _NONE
    if par.virtualized != 0 and traps != 0:
        # The access is an exit: KVM notices an event that its interrupt has not reported yet. The write comes again.
        hook = look_at_event(m, i, k)
        if hook != _NONE:
            return hook
    if pms:
        v.pmscr = event[1]
        par.profile_user = event[1] & PMSCR_E0SPE
        par.profile_kernel = (event[1] & PMSCR_E1SPE) >> 1
        access(m, i, k, 0, 1)
        _set_wanted(par, v)
        return enabled_hooks(m, i, k, True)
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


@jit
def settle(m: Machine, i: int, k: int) -> None:
    """After an act: bring what only clocks and counters tell apart to one form, so that equal states are equal."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    if v.irq_ps != NEVER:
        v.irq_ps = 0
    if v.timer_ps != NEVER:
        v.timer_ps = 0
    if vm_row(m, i).bug_draws != 0:
        par.bug_rate_q16 = 0  # it has struck
    v.buffer_generation %= generations(par)
    if v.pmblimitr & PMBLIMITR_E != 0 and v.pmbsr & PMBSR_S == 0:
        v.stop_cause = 0
    size = par.buffer_pages << 12
    misaligned = v.aux_head & (par.align_bytes - 1)
    if v.handle_open == 0 and v.aux_head == v.aux_tail and misaligned != 0:
        # An empty ring: the driver's next act on it is to pad its head to the alignment of records. Taken as done and
        # read: else the head would drift by a byte a session, which matters to nobody, through all of the ring.
        skip(m, i, k, par.align_bytes - misaligned)
        v.aux_tail = v.aux_head
    if v.reader_ps != NEVER:
        v.reader_ps = 0
    if v.handle_open == 0:
        v.handle_head = 0
        v.handle_wakeup = 0
    # Positions in the ring matter by their differences and modulo its size.
    low = min(v.aux_tail, v.aux_wakeup)
    if v.handle_open != 0:
        low = min(low, v.handle_head)
    low -= low % size
    v.aux_head -= low
    v.aux_tail -= low
    v.aux_wakeup -= low
    if v.handle_open != 0:
        v.handle_head -= low
        v.handle_wakeup -= low
