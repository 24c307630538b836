"""What each act does to a lane: the machine's own rules, called without a clock.

Time stands still in an exploration: `now_ps` is 0, an interrupt or a reader that is due has the time 0, one that is not
has NEVER. Where `simulate` compares clocks to choose what comes next (the end of a system call, a context switch), the
act sets the clock that decides and calls the same function of the machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBLIMITR_E, PMBSR_S
from spepolicy.explore.acts import Act, Aux, Budget, Taint
from spepolicy.explore.bare import bare
from spepolicy.explore.edits import edit
from spepolicy.explore.migrate import migrate
from spepolicy.explore.places import generations, opened, target_page
from spepolicy.jit import jit
from spepolicy.machine.guest import eret_trapped, interrupt_for_restart, segment_end, take_virq
from spepolicy.machine.kvm import ordinary_exit, take_interrupt
from spepolicy.machine.linux_spe import read_ring, skip
from spepolicy.machine.operations import operate
from spepolicy.machine.rows import outcome_type, params, vcpu_row, vm_row
from spepolicy.machine.spu import complete, record_bytes
from spepolicy.machine.state import NEVER, Hook, Machine, Segment

Ints = NDArray[np.int64]

_OPEN = int(Act.OPEN)
_SYSCALL = int(Act.SYSCALL)
_SWITCH_OUT = int(Act.SWITCH_OUT)
_SWITCH_IN = int(Act.SWITCH_IN)
_RENEW = int(Act.RENEW)
_VIRQ = int(Act.VIRQ)
_READ = int(Act.READ)
_RESTORE = int(Act.RESTORE)
_SELECT = int(Act.SELECT)
_IRQ = int(Act.IRQ)
_EXIT = int(Act.EXIT)
_HOST = int(Act.HOST)
_VM_END = int(Act.VM_END)
_TIMER = int(Act.TIMER)
_BUG = int(Act.BUG)
_TAINT = int(Aux.TAINT)
_LAST_OP = int(Aux.LAST_OP)
_OPS_DONE = int(Aux.OPS_DONE)
_SPENT = int(Aux.SPENT)
_UNBOUNDED = int(Budget.NONE)
_MIGRATE_START = int(Act.MIGRATE_START)
_ENDED = int(Taint.ENDED)
_BY_HOST = int(Taint.HOST)
_BY_BUG = int(Taint.BUG)
_KERNEL = int(Segment.KERNEL)
_NONE = int(Hook.NONE)
_VM_DESTROYED = int(Hook.VM_DESTROYED)
_TIMER_HOOK = int(Hook.TIMER)
_ERET_HOOK = int(Hook.ERET)


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
        vcpu_row(m, i, k).timer_ps = NEVER
        return _TIMER_HOOK
    if act == _BUG:
        aux[_TAINT] |= _BY_BUG
        params(m, i).bug_rate_q16 = 1 << 16
        return _NONE
    if act >= _MIGRATE_START:
        return migrate(m, i, aux, act)
    if act >= _SELECT:
        return _hardware(m, i, k, act)
    if act <= _READ:
        return _linux(m, i, k, aux, event)
    if act <= _RESTORE:
        edit(m, i, k, aux, event)
        return _NONE
    return bare(m, i, k, aux, event)


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
def _next_record(m: Machine, par: Any, v: Any) -> int:
    """Return the size of the next record: every operation that explore samples has outcome 0."""
    return record_bytes(par, outcome_type(m)[v.flight_outcome] & 7)


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
        aux[_TAINT] |= opened(k)
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
        aux[_TAINT] &= ~opened(k)
    return hook


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
    if v.pmblimitr & PMBLIMITR_E != 0 and v.pmbsr & PMBSR_S == 0 and v.spe_off == 0:
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
