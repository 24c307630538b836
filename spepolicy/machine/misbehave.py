"""A guest that misbehaves: one small function an act, and the clock that chooses when.

`perform` does one row of the table `Machine.act`; it knows neither clock nor moment, so that an explorer can call it
where it likes. `act_due` and `fire_armed` are the simulation's clocks around it.

An act edits the stage 1 tables that the SPU and KVM walk, or writes a register as an MSR would. Nothing here decides
what comes of it: that is the SPU's and KVM's business.
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import (
    EC_STAGE2,
    PMBLIMITR_E,
    PMBLIMITR_LIMIT,
    PMBSR_DL,
    PMBSR_EA,
    PMBSR_EC_SHIFT,
    PMBSR_MSS,
    PMBSR_S,
)
from spepolicy.jit import jit
from spepolicy.machine.draw import draw, scaled_exponential
from spepolicy.machine.guestacts import GuestAct, Moment
from spepolicy.machine.host import (
    FRAME,
    GONE_GUEST,
    GONE_MASK,
    GONE_SHIFT,
    ROLE_BUFFER,
    ROLE_MASK,
    ROLE_SHIFT,
    cpu_touch,
    operate_on_page,
    resident,
)
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.kvm import access
from spepolicy.machine.layout import DEVICE_PAGE, NOWHERE_PAGE, READ_ONLY_PAGE, guest_page, reserve_generations
from spepolicy.machine.pagetables import ipa_entry, va_leaf
from spepolicy.machine.rows import (
    act,
    exponential,
    frames,
    host_page,
    params,
    pool,
    regime_row,
    tlb,
    truth_row,
    vcpu_row,
    vm_row,
)
from spepolicy.machine.scenario import GuestDriver
from spepolicy.machine.shadow import read_limit, read_pointer, write_pointer
from spepolicy.machine.spu import hold_counter, profiling_enabled
from spepolicy.machine.state import NEVER, STRAY, LostCause, Machine, Segment
from spepolicy.machine.trace import GUEST_ACT, log
from spepolicy.mmu.memory import attach, detach, find
from spepolicy.mmu.regime import UPPER
from spepolicy.mmu.tables import S1_LEAF, TABLE_DESCRIPTOR, level_shift
from spepolicy.mmu.walker import OA_MASK, S1_READ_ONLY, VALID

_REMAP, _UNMAP, _WRITE_PROTECT, _MIGRATE, _RESTORE = (int(GuestAct(n)) for n in range(5))
_FREE_TABLE, _REUSE_TABLE, _BALLOON_TABLE = (int(GuestAct(n)) for n in range(5, 8))
_READ_ONLY_SLOT, _DEVICE, _NOWHERE = (int(GuestAct(n)) for n in range(8, 11))
_FORGE, _BEYOND_LIMIT, _CYCLE = (int(GuestAct(n)) for n in range(11, 14))
_ANY, _DISABLED, _BEFORE_ERET, _PROFILING = (int(moment) for moment in Moment)
_KERNEL, _START_SAMPLING = int(Segment.KERNEL), int(Segment.START_SAMPLING)
_GUEST_ERROR = int(LostCause.GUEST_ERROR)
_DONTNEED = int(HostOp.DONTNEED)
_CAUSE_GUEST = 2
_WINDOWS = int(GuestDriver.WINDOWS)

# Columns of Machine.act.
_ACT, _EVERY, _AT, _MOMENT, _TLBI, _PAGES = range(6)


# ---- translations ----------------------------------------------------------------------------------------------------


@jit
def _offset(m: Machine, i: int, k: int) -> int:
    """Return the offset into the AUX ring of the page that the SPU writes to next."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    enabled = read_limit(par, v) & PMBLIMITR_E != 0
    head = read_pointer(par, v) - v.buffer_base if enabled else v.aux_head
    return head & ((par.buffer_pages << 12) - 1) & ~0xFFF


@jit
def _translation_changed(m: Machine, i: int, va: int, pages: int, tlbi: int) -> None:
    """TLBI VAAE1IS for *pages* pages from *va*; or none, and the SPUs go on with what their TLBs hold.

    With PMBLIMITR_EL1.nVM stage 1 does not count: the SPU goes on to the pages that its registers name.
    """
    physical = params(m, i).physical
    for k in range(params(m, i).vcpus):
        v = vcpu_row(m, i, k)
        entries = tlb(m, i, k)
        first = (va + (v.buffer_base - v.buffer_va)) >> 12
        for e in range(entries.shape[0]):
            if entries[e, 0] != -1 and first <= entries[e, 0] < first + pages:
                if tlbi == 0 or physical != 0:
                    entries[e, 3] |= STRAY
                    if entries[e, 0] == v.tlb_page:
                        truth_row(m, i, k).diverged_now = entries[e, 3]
                    continue
                if entries[e, 0] == v.tlb_page:
                    v.tlb_page = -1
                entries[e, 0] = -1


@jit
def _set_role(m: Machine, i: int, descriptor: int, role: int) -> None:
    """Note for the judge what the guest uses the page behind a leaf for, if it is RAM."""
    page = ((descriptor & OA_MASK) >> 12) - params(m, i).ram_page0
    if descriptor & VALID != 0 and 0 <= page < params(m, i).ram_pages:
        host_page(m, i)[page] = (host_page(m, i)[page] & ~ROLE_MASK) | (role << ROLE_SHIFT)


@jit
def write_leaf(m: Machine, i: int, va: int, descriptor: int, tlbi: int) -> None:
    """The guest stores *descriptor* as the level 3 descriptor of *va*. A page that stage 2 does not map, behind an
    enabled buffer, is of the guest's making: the judge is told.
    """
    slot, entry, _reads = va_leaf(m, i, va)
    if slot < 0:
        return
    _set_role(m, i, pool(m, i)[slot, entry], 0)
    pool(m, i)[slot, entry] = descriptor
    _set_role(m, i, descriptor, ROLE_BUFFER)
    _translation_changed(m, i, va, 1, tlbi)


@jit
def blame_guest(m: Machine, i: int, k: int, page: int) -> None:
    """If stage 2 has nothing for guest page *page* and the buffer is on, the fault that comes is the guest's doing."""
    if read_limit(params(m, i), vcpu_row(m, i, k)) & PMBLIMITR_E == 0:
        return
    slot, entry, _level = ipa_entry(m, i, (params(m, i).ram_page0 + page) << 12)
    if pool(m, i)[slot, entry] & VALID == 0:
        host_page(m, i)[page] = (host_page(m, i)[page] & ~GONE_MASK) | (GONE_GUEST << GONE_SHIFT)


@jit
def _other_page(m: Machine, i: int, k: int, offset: int, current: int) -> int:
    """Return a page of the guest that is behind no VA: that of one of the sessions to come."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.moved += 1
    spare = reserve_generations(par)
    page = guest_page(par, k, v.buffer_generation + 1 + v.moved % spare, offset >> 12)
    if page == current:
        page = guest_page(par, k, v.buffer_generation + 1 + (v.moved + 1) % spare, offset >> 12)
    return page


@jit
def move_page(m: Machine, i: int, k: int, offset: int, by_cpu: int, tlbi: int) -> None:
    """REMAP and MIGRATE: another page goes behind the page at *offset* of the buffer; with *by_cpu* the CPU copies what
    was there, so that stage 2 maps the new page.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    va = v.buffer_va + offset
    slot, entry, _reads = va_leaf(m, i, va)
    if slot < 0:
        return
    page = _other_page(m, i, k, offset, ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - par.ram_page0)
    if par.virtualized != 0 and by_cpu != 0:
        faults = cpu_touch(m, i, page, 1)
        tr = truth_row(m, i, k)
        tr.cpu_faults += faults
        tr.other_host_ps += faults * par.cpu_fault_ps
        v.host_ps += faults * par.cpu_fault_ps
    elif par.virtualized != 0:
        blame_guest(m, i, k, page)
    write_leaf(m, i, va, ((par.ram_page0 + page) << 12) | S1_LEAF, tlbi)


@jit
def change_leaf(m: Machine, i: int, va: int, clear: int, put: int, tlbi: int) -> None:
    """UNMAP and WRITE_PROTECT: clear and set bits of the level 3 descriptor of *va*."""
    slot, entry, _reads = va_leaf(m, i, va)
    if slot >= 0:
        write_leaf(m, i, va, (pool(m, i)[slot, entry] & ~clear) | put, tlbi)


@jit
def point_leaf_at(m: Machine, i: int, va: int, ipa_page: int, tlbi: int) -> None:
    """READ_ONLY_SLOT, DEVICE and NOWHERE: a page outside RAM goes behind *va*."""
    write_leaf(m, i, va, (ipa_page << 12) | S1_LEAF, tlbi)


@jit
def level2_entry(m: Machine, i: int, va: int) -> tuple[int, int]:
    """Return (slot, entry) of the guest's level 2 descriptor of *va*, or (-1, 0)."""
    par = params(m, i)
    address = vm_row(m, i).ttbr1 & OA_MASK
    for level in range(3):
        page = (address >> 12) - par.ram_page0
        if page < 0 or page >= par.ram_pages:
            break
        slot = find(frames(m, i), host_page(m, i)[page] & FRAME)
        entry = (va >> level_shift(regime_row(m, i, UPPER), level)) & 511
        if slot < 0:
            break
        if level == 2:
            return slot, entry
        descriptor = pool(m, i)[slot, entry]
        if descriptor & TABLE_DESCRIPTOR != TABLE_DESCRIPTOR:
            break
        address = descriptor & OA_MASK
    return -1, 0


@jit
def free_table(m: Machine, i: int, k: int, va: int, tlbi: int) -> None:
    """FREE_TABLE: unlink the level 3 table of *va*."""
    v = vcpu_row(m, i, k)
    slot, entry = level2_entry(m, i, va)
    if slot < 0 or pool(m, i)[slot, entry] & VALID == 0 or v.table_freed != 0:
        return
    v.table_freed = pool(m, i)[slot, entry]
    v.table_freed_va = va
    pool(m, i)[slot, entry] = 0
    _translation_changed(m, i, va & ~0x1F_FFFF, 512, tlbi)


@jit
def reuse_table(m: Machine, i: int, k: int, va: int, tlbi: int) -> None:
    """REUSE_TABLE: whatever is stored in the level 3 table of *va* now is no descriptor."""
    v = vcpu_row(m, i, k)
    slot, _entry, _reads = va_leaf(m, i, va)
    if slot < 0:
        return
    for n in range(512):
        _set_role(m, i, pool(m, i)[slot, n], 0)
        pool(m, i)[slot, n] = draw(v.key_act + 1, n)
    _translation_changed(m, i, va & ~0x1F_FFFF, 512, tlbi)


@jit
def balloon_table(m: Machine, i: int, k: int, va: int, tlbi: int) -> None:
    """BALLOON_TABLE: the VMM discards the page of the level 3 table of *va* (MADV_DONTNEED); a zero page follows."""
    par = params(m, i)
    slot, entry = level2_entry(m, i, va)
    if par.virtualized == 0 or slot < 0 or pool(m, i)[slot, entry] & VALID == 0:
        return
    page = ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - par.ram_page0
    if page < 0 or page >= par.ram_pages:
        return
    words = host_page(m, i)
    old = words[page] & FRAME
    role = words[page] & ROLE_MASK
    words[page] &= ~ROLE_MASK
    operate_on_page(m, i, _DONTNEED, page)
    words[page] |= role
    resident(m, i, page, 1)  # the guest writes to it before it uses it: a zeroed page of its own
    leaf_slot, leaf, _level = ipa_entry(m, i, (par.ram_page0 + page) << 12)
    if pool(m, i)[leaf_slot, leaf] & VALID == 0:
        # Where a filter keeps a pinned page, stage 2 goes on showing the old table; else all that follows is zero.
        words[page] = (words[page] & ~GONE_MASK) | (GONE_GUEST << GONE_SHIFT)
        table = detach(frames(m, i), old)
        if table >= 0:
            pool(m, i)[table, :] = 0
            attach(frames(m, i), words[page] & FRAME, table)
    _translation_changed(m, i, va & ~0x1F_FFFF, 512, tlbi)


@jit
def restore_buffer(m: Machine, i: int, k: int, tlbi: int) -> None:
    """RESTORE: link a table that was freed, and map every page of the buffer that is not mapped writable to RAM."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    if v.table_freed != 0:
        slot, entry = level2_entry(m, i, v.table_freed_va)
        if slot >= 0:
            pool(m, i)[slot, entry] = v.table_freed
        v.table_freed = 0
    for n in range(par.buffer_pages):
        va = v.buffer_va + (n << 12)
        slot, entry, _reads = va_leaf(m, i, va)
        if slot < 0:
            continue
        descriptor = pool(m, i)[slot, entry]
        page = ((descriptor & OA_MASK) >> 12) - par.ram_page0
        if descriptor & ~OA_MASK != S1_LEAF or page < 0 or page >= par.ram_pages:
            page = guest_page(par, k, v.buffer_generation, n)
            write_leaf(m, i, va, ((par.ram_page0 + page) << 12) | S1_LEAF, tlbi)


# ---- registers -------------------------------------------------------------------------------------------------------


@jit
def forge_event(m: Machine, i: int, k: int, syndrome: int) -> None:
    """FORGE: MSR PMBSR_EL1 with S=1. Where the write traps KVM keeps it apart from the hardware's own events; where it
    does not, PMBIRQ rises as for any event (spe.md rule 46, kvm.md 4.1 G8).
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    access(m, i, k, 1, 0)
    if v.pmbsr & PMBSR_S != 0:
        return
    tr.forged += 1
    hold_counter(v, v.now_ps)
    v.pmbsr = syndrome | PMBSR_S
    v.stop_ps = v.now_ps
    v.stop_cause = _GUEST_ERROR
    tr.fault_cause = _CAUSE_GUEST
    tr.fault_loss_cause = _GUEST_ERROR
    if par.virtualized != 0 and par.trap_pmb != 0:
        v.guest_pmbsr = v.pmbsr
        v.event_seen = 1
        v.virq = 1 if par.driver != _WINDOWS else 0
    else:
        v.event_seen = 0
        v.irq_ps = v.now_ps + par.irq_latency_ps


@jit
def point_beyond_limit(m: Machine, i: int, k: int) -> None:
    """BEYOND_LIMIT: MSR PMBPTR_EL1 with the address in PMBLIMITR_EL1.LIMIT, while the buffer is on."""
    v = vcpu_row(m, i, k)
    access(m, i, k, 1, 0)
    par = params(m, i)
    if read_limit(par, v) & PMBLIMITR_E != 0 and v.pmbsr & PMBSR_S == 0:
        write_pointer(par, v, read_limit(par, v) & PMBLIMITR_LIMIT)


@jit
def end_session(m: Machine, i: int, k: int) -> None:
    """CYCLE: the session ends at the end of what executes now, and the next one has other pages."""
    v = vcpu_row(m, i, k)
    v.renew_next_ps = min(v.renew_next_ps, v.now_ps)
    if v.segment <= _KERNEL and v.segment_end_ps > v.now_ps:
        v.segment_ps -= v.segment_end_ps - v.now_ps
        v.segment_end_ps = v.now_ps


# ---- one row of the table --------------------------------------------------------------------------------------------


@jit
def _syndrome(bits: int) -> int:
    """Return a syndrome of the guest's choice: a stage 2 abort every other time, else anything that the fields hold."""
    ec = EC_STAGE2 if bits & 1 == 0 else (bits >> 1) & 0x3F
    flags = (PMBSR_DL if bits & 0x100 != 0 else 0) | (PMBSR_EA if bits & 0x200 != 0 else 0)
    return (ec << PMBSR_EC_SHIFT) | flags | ((bits >> 16) & PMBSR_MSS)


@jit
def perform(m: Machine, i: int, k: int, r: int) -> None:
    """Do what row *r* of `Machine.act` says, now."""
    v = vcpu_row(m, i, k)
    truth_row(m, i, k).acts += 1
    kind = act(m)[r, _ACT]
    tlbi = act(m)[r, _TLBI]
    log(m, i, k, GUEST_ACT, kind, v.buffer_va + _offset(m, i, k), v.pmbsr)
    if kind == _FORGE:
        v.act_draws += 1
        forge_event(m, i, k, _syndrome(draw(v.key_act, v.act_draws)))
    elif kind == _BEYOND_LIMIT:
        point_beyond_limit(m, i, k)
    elif kind == _CYCLE:
        end_session(m, i, k)
    elif kind == _RESTORE:
        restore_buffer(m, i, k, tlbi)
    elif kind >= _FREE_TABLE and kind <= _BALLOON_TABLE:
        va = v.buffer_va + _offset(m, i, k)
        if kind == _FREE_TABLE:
            free_table(m, i, k, va, tlbi)
        elif kind == _REUSE_TABLE:
            reuse_table(m, i, k, va, tlbi)
        else:
            balloon_table(m, i, k, va, tlbi)
    else:
        size = params(m, i).buffer_pages << 12
        offset = _offset(m, i, k)
        for _ in range(act(m)[r, _PAGES]):
            _change_page(m, i, k, kind, offset, tlbi)
            offset = (offset + 4096) & (size - 1)


@jit
def _change_page(m: Machine, i: int, k: int, kind: int, offset: int, tlbi: int) -> None:
    va = vcpu_row(m, i, k).buffer_va + offset
    if kind in (_REMAP, _MIGRATE):
        move_page(m, i, k, offset, 1 if kind == _MIGRATE else 0, tlbi)
    elif kind == _UNMAP:
        change_leaf(m, i, va, VALID, 0, tlbi)
    elif kind == _WRITE_PROTECT:
        change_leaf(m, i, va, 0, S1_READ_ONLY, tlbi)
    else:
        page = READ_ONLY_PAGE if kind == _READ_ONLY_SLOT else (DEVICE_PAGE if kind == _DEVICE else NOWHERE_PAGE)
        point_leaf_at(m, i, va, page, tlbi)


# ---- when ------------------------------------------------------------------------------------------------------------


@jit
def schedule_act(m: Machine, i: int, k: int) -> None:
    """Set the time and row of the next act: competing exponential clocks, and acts at a fixed time."""
    v = vcpu_row(m, i, k)
    best = NEVER
    for r in range(act(m).shape[0]):
        every, at = act(m)[r, _EVERY], act(m)[r, _AT]
        if every > 0:
            v.act_draws += 1
            t = v.now_ps + 1 + scaled_exponential(exponential(m), draw(v.key_act, v.act_draws), every)
        elif at > v.now_ps:
            t = at
        else:
            continue
        if t < best:
            best = t
            v.act_index = r
    v.act_next_ps = best


@jit
def _is_moment(v: Any, kind: int, moment: int, ended: int) -> bool:
    """Tell whether an act may happen now; *ended* is the segment that has just ended, -1 for none."""
    if kind >= _FORGE and v.segment > _KERNEL:
        return False  # the vCPU executes the driver, with interrupts masked
    if moment == _DISABLED:
        return v.pmblimitr & PMBLIMITR_E == 0
    if moment == _BEFORE_ERET:
        return ended == _START_SAMPLING
    if moment == _PROFILING:
        return profiling_enabled(v) and v.segment <= _KERNEL
    return True


@jit
def act_due(m: Machine, i: int, k: int) -> None:
    """The clock of vCPU *k*'s acts has come: act, or wait for the moment."""
    v = vcpu_row(m, i, k)
    chosen = v.act_index
    for r in range(act(m).shape[0]):
        if r == chosen or (act(m)[r, _EVERY] == 0 and act(m)[r, _AT] == v.now_ps):
            if _is_moment(v, act(m)[r, _ACT], act(m)[r, _MOMENT], -1):
                perform(m, i, k, r)
            else:
                v.act_armed |= 1 << r
    schedule_act(m, i, k)


@jit
def fire_armed(m: Machine, i: int, k: int, ended: int) -> None:
    """A segment has ended: do the acts whose moment this is."""
    v = vcpu_row(m, i, k)
    for r in range(act(m).shape[0]):
        if (v.act_armed >> r) & 1 != 0 and _is_moment(v, act(m)[r, _ACT], act(m)[r, _MOMENT], ended):
            v.act_armed &= ~(1 << r)
            perform(m, i, k, r)
