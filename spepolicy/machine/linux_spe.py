"""The guest's SPE driver and perf's AUX ring, as in Linux 6.18 drivers/perf/arm_spe_pmu.c and
kernel/events/ring_buffer.c.

Section 3 of spe.md gives the arithmetic and the interrupt handler's table. Positions in the ring are byte counts since
it was opened (`aux_head`, `aux_tail`); the offset into the buffer is the position modulo its size. A register access
that traps is charged by `kvm.access`.
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import (
    BSC_FULL,
    EC_OTHER,
    PMBLIMITR_DISCARD,
    PMBLIMITR_E,
    PMBLIMITR_NVM,
    PMBSR_COLL,
    PMBSR_DL,
    PMBSR_EC_MASK,
    PMBSR_EC_SHIFT,
    PMBSR_S,
    PMSCR_E0SPE,
    PMSCR_E1SPE,
    PMSFCR_FDS,
    PMSFCR_FE,
    PMSFCR_FL,
    PMSFCR_FNE,
    PMSFCR_FT,
    PMSFCR_MASK_SHIFT,
    PMSFCR_TYPE_SHIFT,
    PMSIRR_RND,
)
from spepolicy.jit import jit
from spepolicy.machine.host import DEFERRED, ROLE_BUFFER, ROLE_MASK, ROLE_SHIFT, cpu_touch
from spepolicy.machine.kvm import access
from spepolicy.machine.layout import guest_page, ring_base
from spepolicy.machine.pagetables import va_leaf
from spepolicy.machine.rows import (
    host_page,
    params,
    pool,
    seen,
    tlb,
    truth_row,
    unseen,
    vcpu_row,
)
from spepolicy.machine.shadow import read_limit, read_pointer, write_limit, write_pointer
from spepolicy.machine.spu import drain, hold_counter
from spepolicy.machine.state import NEVER, LostCause, Machine
from spepolicy.machine.trace import (
    AUX,
    AUX_BEGIN,
    HANDLED,
    ONE,
    PADDED,
    READ,
    REG_PMBLIMITR,
    REG_PMBPTR,
    REG_PMBSR,
    REG_PMSCR,
    REG_PMSEVFR,
    REG_PMSFCR,
    REG_PMSIRR,
    REG_PMSLATFR,
    REGISTER,
    RENEWED,
    RING_FULL,
    SETTLED,
    TWO,
    ZERO,
    log,
)
from spepolicy.mmu.tables import S1_LEAF
from spepolicy.mmu.walker import OA_MASK

TRUNCATED = 1
PARTIAL = 4
COLLISION = 8

_RING_FULL = int(LostCause.RING_FULL)
_REFUSED = int(LostCause.REFUSED)


@jit
def _wake_reader(par: Any, v: Any) -> None:
    """perf_output_wakeup(): perf has read everything after its latency and the time that copying takes."""
    if v.reader_ps == NEVER:
        copy_ps = ((v.aux_head - v.aux_tail) * par.reader_ps_per_kib) >> 10
        v.reader_ps = v.now_ps + par.reader_latency_ps + copy_ps


@jit
def output_end(m: Machine, i: int, k: int, size: int) -> None:
    """perf_aux_output_end(): hand *size* bytes over, wake perf if the watermark is passed or data was lost."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    log(m, i, k, AUX, v.aux_flags, v.handle_head, size)
    v.aux_head += size
    v.handle_open = 0
    watermark = (par.buffer_pages << 12) >> 1
    if v.aux_head - v.aux_wakeup >= watermark:
        v.aux_wakeup = v.aux_head - v.aux_head % watermark
        _wake_reader(par, v)
    if v.aux_flags & TRUNCATED != 0:
        # irq_work disables the event; perf record enables it again when it has read the data.
        v.event_active = 0
        tr.truncated += 1
        _wake_reader(par, v)
    settle_records(m, i, k, v.aux_flags & PARTIAL != 0 and par.align_bytes != par.max_record_bytes)


@jit
def settle_records(m: Machine, i: int, k: int, discard: bool) -> None:
    """Decide what becomes of the records written since the handle was opened.

    With DL=1 and records of variable size nobody can find the last whole record, and records need not be written in
    order, so all of them are thrown away (kvm.md 2.0 fact 3); fixed-size records end where the last whole one ends.
    """
    tr = truth_row(m, i, k)
    for f in range(seen(m, i, k).shape[0]):
        if not discard:
            seen(m, i, k)[f] += unseen(m, i, k)[f]
        unseen(m, i, k)[f] = 0
    log(m, i, k, SETTLED, ONE if discard else ZERO, tr.pending, ZERO)
    if discard:
        tr.discarded += tr.pending
    else:
        tr.kept += tr.pending
    tr.pending = 0


@jit
def skip(m: Machine, i: int, k: int, size: int) -> None:
    """Fill *size* bytes with padding and skip them (arm_spe_pmu_pad_buf, perf_aux_output_skip)."""
    v = vcpu_row(m, i, k)
    par = params(m, i)
    log(m, i, k, PADDED, ZERO, v.aux_head, size)
    v.aux_head += size
    v.handle_head = v.aux_head
    watermark = (par.buffer_pages << 12) >> 1
    if v.aux_head - v.aux_wakeup >= watermark:
        v.aux_wakeup = v.aux_head - v.aux_head % watermark
        v.handle_wakeup = v.aux_wakeup + watermark
        _wake_reader(par, v)


@jit
def _next_offset(m: Machine, i: int, k: int) -> int:
    """Return the end of the next writable stretch as a buffer offset, or 0 for none (spe.md 3.2, steps 1 to 4)."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    size = par.buffer_pages << 12
    mask = size - 1
    free = (v.aux_tail - v.aux_head - 1) & mask
    misaligned = v.aux_head & (par.align_bytes - 1)
    if misaligned != 0:
        pad = min(par.align_bytes - misaligned, free)
        skip(m, i, k, pad)
        free -= pad
    if free == 0:
        return 0
    head = v.aux_head & mask
    tail = (v.aux_head + free) & mask
    limit = size
    if head < tail:
        limit = tail & ~0xFFF
    # The handle's end does not move when its head does: aux_head + free is the same before and after padding.
    wakeup = v.handle_wakeup & mask
    if v.handle_wakeup < v.aux_head + free and head <= wakeup:
        limit = min(limit, (wakeup + 0xFFF) & ~0xFFF)
    if limit > head:
        return limit
    skip(m, i, k, free)
    return 0


@jit
def output_begin(m: Machine, i: int, k: int) -> None:
    """arm_spe_perf_aux_output_begin(): open a handle and program PMBPTR_EL1 and PMBLIMITR_EL1, or find no space."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    size = par.buffer_pages << 12
    v.aux_flags = 0
    if par.hidden != 0:
        # perf_event_open() fails: the guest has no SPE, and its user waits for data in vain.
        v.event_active = 0
        v.stop_cause = _REFUSED
        return
    write_limit(par, v, 0)
    if par.discard != 0:
        # No AUX session: nothing is written (spe.md 3.2 step 6).
        write_limit(par, v, PMBLIMITR_DISCARD | PMBLIMITR_E)
        log(m, i, k, REGISTER, REG_PMBLIMITR, read_limit(par, v), ZERO)
        access(m, i, k, 1, 0)
        return
    if v.aux_head - v.aux_tail >= size - 1:
        # perf_aux_output_begin() fails: the event is disabled and perf is woken.
        _no_space(m, i, k)
        access(m, i, k, 1, 0)
        return
    v.handle_open = 1
    v.handle_head = v.aux_head
    v.handle_wakeup = v.aux_wakeup + (size >> 1)
    limit = _next_offset(m, i, k)
    head = v.aux_head & (size - 1)
    if limit != 0 and limit - head < par.max_record_bytes:
        skip(m, i, k, limit - head)
        limit = _next_offset(m, i, k)
        head = v.aux_head & (size - 1)
    if limit == 0:
        v.aux_flags = TRUNCATED
        output_end(m, i, k, 0)
        _no_space(m, i, k)
        access(m, i, k, 1, 0)
        return
    tr.sessions += 1
    v.handle_head = v.aux_head
    write_pointer(par, v, v.buffer_base + head)
    write_limit(par, v, (v.buffer_base + limit) | PMBLIMITR_E | (PMBLIMITR_NVM if par.physical != 0 else 0))
    log(m, i, k, AUX_BEGIN, ZERO, v.aux_head, v.aux_head + limit - head)
    log(m, i, k, REGISTER, REG_PMBPTR, read_pointer(par, v), ZERO)
    log(m, i, k, REGISTER, REG_PMBLIMITR, read_limit(par, v), ZERO)
    access(m, i, k, 2 + par.physical, 0)  # PMBMAR_EL1 too: Normal Write-Back, as the kernel maps the ring


@jit
def _no_space(m: Machine, i: int, k: int) -> None:
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.event_active = 0
    v.stop_cause = _RING_FULL
    tr.ring_full += 1
    log(m, i, k, RING_FULL, ZERO, ZERO, ZERO)
    log(m, i, k, REGISTER, REG_PMBLIMITR, read_limit(par, v), ZERO)
    _wake_reader(par, v)


@jit
def start_sampling(m: Machine, i: int, k: int) -> None:
    """arm_spe_pmu_start(), second part: filters, interval and last PMSCR_EL1 (spe.md 3.5)."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    v.pmsfcr = 0
    if par.type_filter != 0 or par.type_mask != 0:
        v.pmsfcr |= PMSFCR_FT | (par.type_filter << PMSFCR_TYPE_SHIFT) | (par.type_mask << PMSFCR_MASK_SHIFT)
    if par.event_filter != 0:
        v.pmsfcr |= PMSFCR_FE
    if par.min_latency_cycles != 0:
        v.pmsfcr |= PMSFCR_FL
    if par.inverted_event_filter != 0:
        v.pmsfcr |= PMSFCR_FNE
    if par.data_source_filter != 0:
        v.pmsfcr |= PMSFCR_FDS
    v.pmsevfr = par.event_filter
    v.pmsnevfr = par.inverted_event_filter
    v.pmsdsfr = par.data_source_filter
    v.pmslatfr = par.min_latency_cycles
    v.pmsirr = par.period_ops | (PMSIRR_RND if par.jitter != 0 else 0)
    v.pmscr = par.pmscr | (PMSCR_E0SPE if par.profile_user != 0 else 0)
    v.pmscr |= PMSCR_E1SPE if par.profile_kernel != 0 else 0
    log(m, i, k, REGISTER, REG_PMSFCR, v.pmsfcr, ZERO)
    log(m, i, k, REGISTER, REG_PMSEVFR, v.pmsevfr, ZERO)
    log(m, i, k, REGISTER, REG_PMSLATFR, v.pmslatfr, ZERO)
    log(m, i, k, REGISTER, REG_PMSIRR, v.pmsirr, ZERO)
    log(m, i, k, REGISTER, REG_PMSCR, v.pmscr, ZERO)
    access(m, i, k, 0, 6)


@jit
def stop_sampling(m: Machine, i: int, k: int) -> None:
    """arm_spe_pmu_disable_and_drain_local(), up to the drain: PMSCR_EL1=0, ISB, PSB CSYNC, DSB. With `drain_due` KVM
    looks at the write first, and the caller drains.
    """
    v = vcpu_row(m, i, k)
    hold_counter(v, v.now_ps)
    v.pmscr = 0
    log(m, i, k, REGISTER, REG_PMSCR, v.pmscr, ZERO)
    if v.drain_due == 0:
        drain(m, i, k)
    access(m, i, k, 0, 1)


@jit
def collect(m: Machine, i: int, k: int, syndrome: int) -> bool:
    """arm_spe_pmu_buf_get_fault_act() and output_end(): close the handle. Return True if the event was anything but
    buffer full.
    """
    v = vcpu_row(m, i, k)
    if syndrome & PMBSR_DL != 0:
        v.aux_flags |= TRUNCATED | PARTIAL
    if syndrome & PMBSR_COLL != 0:
        v.aux_flags |= COLLISION
    par = params(m, i)
    mask = (par.buffer_pages << 12) - 1
    # PTR - head: on a fault in the middle of a record the partial bytes are handed over too.
    size = (read_pointer(par, v) - v.buffer_base) - (v.handle_head & mask)
    output_end(m, i, k, min(max(size, 0), mask + 1 - (v.handle_head & mask)))  # a forged PMBPTR hands over nothing more
    full = (syndrome & PMBSR_EC_MASK) >> PMBSR_EC_SHIFT == EC_OTHER and syndrome & 0x3F == BSC_FULL
    return not full


@jit
def stop_buffer(m: Machine, i: int, k: int) -> None:
    """arm_spe_pmu_stop(), second part: PMBLIMITR_EL1=0, then close an open handle by what PMBSR_EL1 says."""
    v = vcpu_row(m, i, k)
    par = params(m, i)
    write_limit(par, v, read_limit(par, v) & ~PMBLIMITR_E)
    log(m, i, k, REGISTER, REG_PMBLIMITR, read_limit(par, v), ZERO)
    access(m, i, k, 1, 0)
    if v.handle_open != 0:
        syndrome = visible_syndrome(par, v)
        access(m, i, k, 2, 1)  # PMBSR and PMBPTR; PMSICR to continue the interval next time
        if syndrome & PMBSR_S != 0 and params(m, i).driver == 0:
            collect(m, i, k, syndrome)
            clear_syndrome(v)
            log(m, i, k, REGISTER, REG_PMBSR, ZERO, ZERO)
            access(m, i, k, 1, 0)
        else:
            collect(m, i, k, (syndrome & PMBSR_COLL) | BSC_FULL)
            clear_syndrome(v)


@jit
def visible_syndrome(par: Any, v: Any) -> int:
    """Return what the guest reads from PMBSR_EL1: KVM's view of it where the access traps, else the register."""
    if par.virtualized != 0 and par.trap_pmb != 0:
        return v.guest_pmbsr | (v.pmbsr & PMBSR_COLL)
    return v.pmbsr


@jit
def clear_syndrome(v: Any) -> None:
    """The guest writes PMBSR_EL1=0; the level of PMBIRQ falls."""
    v.guest_pmbsr = 0
    v.pmbsr = 0
    v.virq = 0
    v.irq_ps = NEVER
    v.event_seen = 0


@jit
def interrupt_syndrome(m: Machine, i: int, k: int) -> int:
    """How a handler begins: read PMBSR_EL1 and return it, or 0 where the interrupt is spurious and dealt with."""
    v = vcpu_row(m, i, k)
    syndrome = visible_syndrome(params(m, i), v)
    access(m, i, k, 1, 0)
    v.virq = 0
    if syndrome & PMBSR_S != 0 and v.handle_open != 0:
        return syndrome
    truth_row(m, i, k).spurious += 1
    log(m, i, k, HANDLED, ZERO, syndrome, ZERO)
    if syndrome & PMBSR_S != 0:
        clear_syndrome(v)
    return 0


@jit
def handle_interrupt(m: Machine, i: int, k: int) -> bool:
    """arm_spe_pmu_irq_handler(). Return True if it left the buffer enabled by its write to PMBSR_EL1 (spe.md 3.4)."""
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    syndrome = interrupt_syndrome(m, i, k)
    if syndrome == 0:
        return False
    access(m, i, k, 1, 0)  # PMBPTR_EL1
    fatal = collect(m, i, k, syndrome)
    # The flags are gone once the handle is closed; what perf was told is in event_active and in the syndrome.
    if fatal:
        tr.fatal += 1
        if syndrome & PMBSR_DL == 0:
            tr.silent_fatal += 1
    if fatal or v.event_active == 0:
        stop_sampling(m, i, k)
        write_limit(params(m, i), v, 0)
        log(m, i, k, REGISTER, REG_PMBLIMITR, ZERO, ZERO)
        access(m, i, k, 1, 0)
    else:
        output_begin(m, i, k)
        if v.event_active == 0:
            stop_sampling(m, i, k)  # no space: perf's irq_work disables the event before the handler returns
    clear_syndrome(v)
    log(m, i, k, REGISTER, REG_PMBSR, ZERO, ZERO)
    log(m, i, k, HANDLED, TWO if read_limit(params(m, i), v) == 0 else ONE, syndrome, ZERO)
    access(m, i, k, 1, 0)
    return read_limit(params(m, i), v) & PMBLIMITR_E != 0


@jit
def read_ring(m: Machine, i: int, k: int) -> None:
    """perf record consumes the ring: its CPU touches the pages, the tail moves, and a disabled event is enabled again.

    (tools/perf: auxtrace_record__read_finish() enables an event that the kernel disabled for lack of space or for lost
    data.)
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    mask = (par.buffer_pages << 12) - 1
    first = v.aux_tail >> 12
    last = (v.aux_head + 0xFFF) >> 12
    for page in range(first, last):
        va = v.buffer_va + ((page << 12) & mask)
        slot, entry, _reads = va_leaf(m, i, va)
        if slot >= 0 and pool(m, i)[slot, entry] & 1 != 0 and par.virtualized != 0:
            behind = ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - par.ram_page0
            if 0 <= behind < par.ram_pages:
                tr.cpu_faults += cpu_touch(m, i, behind, 0)
                _copy_deferred(m, i, k, behind)
    log(m, i, k, READ, ZERO, v.aux_tail, v.aux_head)
    v.aux_tail = v.aux_head
    v.reader_ps = NEVER
    if v.event_active == 0 and v.session_over == 0:
        v.event_active = 1
        v.restart = 1


@jit
def _copy_deferred(m: Machine, i: int, k: int, page: int) -> None:
    """The guest's CPU touches a page that KVM took away to copy its records then (kvm.md P7b): the fault copies."""
    if host_page(m, i)[page] & DEFERRED == 0:
        return
    host_page(m, i)[page] &= ~DEFERRED
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    cost = par.cpu_fault_ps + par.copy_out_page_ps + par.map_page_ps
    tr.deferred_copies += 1
    tr.copied_bytes += 4096
    tr.copy_ps += cost
    tr.hook_total_ps += cost
    v.host_ps += cost


@jit
def renew_buffer(m: Machine, i: int, k: int) -> None:
    """perf ends and starts again: the kernel maps new AUX pages behind the same VA (unmap, TLBI, map), zeroed by the
    CPU.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.buffer_generation += 1
    v.buffer_base = ring_base(par, v, k)
    log(m, i, k, RENEWED, ZERO, v.buffer_generation, ZERO)
    for n in range(par.buffer_pages):
        va = v.buffer_va + (n << 12)
        slot, entry, _reads = va_leaf(m, i, va)
        if slot < 0:
            continue  # a guest that freed its own table
        old = ((pool(m, i)[slot, entry] & OA_MASK) >> 12) - par.ram_page0
        if 0 <= old < par.ram_pages:
            host_page(m, i)[old] = host_page(m, i)[old] & ~(ROLE_MASK | DEFERRED)  # nobody reads what is left in it
        pool(m, i)[slot, entry] = 0
    for e in range(tlb(m, i, k).shape[0]):
        tlb(m, i, k)[e, 0] = -1
    v.tlb_page = -1
    faults = 0
    for n in range(par.buffer_pages):
        va = v.buffer_va + (n << 12)
        slot, entry, _reads = va_leaf(m, i, va)
        if slot < 0:
            continue
        page = guest_page(par, k, v.buffer_generation, n)
        pool(m, i)[slot, entry] = ((par.ram_page0 + page) << 12) | S1_LEAF
        host_page(m, i)[page] = host_page(m, i)[page] | (ROLE_BUFFER << ROLE_SHIFT)
        if par.virtualized != 0 and par.buffer_mapped != 0:
            faults += cpu_touch(m, i, page, 1)
    tr.cpu_faults += faults
    v.host_ps += faults * par.cpu_fault_ps
    tr.other_host_ps += faults * par.cpu_fault_ps
    v.aux_head = 0
    v.aux_tail = 0
    v.aux_wakeup = 0
    v.reader_ps = NEVER
    v.session_over = 0
    v.event_active = 1
