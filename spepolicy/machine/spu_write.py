"""What becomes of a sampled operation that is done: filters, the record's size, the write through two stages of
translation. Rules are numbered as in spe.md section 2.
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import (
    BSC_FULL,
    EC_OTHER,
    FSC_EXTERNAL_ABORT,
    PMBLIMITR_DISCARD,
    PMBLIMITR_FM,
    PMBLIMITR_LIMIT,
    PMBLIMITR_NVM,
    PMBSR_EC_SHIFT,
    PMSFCR_FDS,
    PMSFCR_FE,
    PMSFCR_FL,
    PMSFCR_FNE,
    PMSFCR_FT,
    PMSFCR_MASK_SHIFT,
    PMSFCR_TYPE_SHIFT,
)
from spepolicy.jit import jit
from spepolicy.machine.draw import draw
from spepolicy.machine.host import (
    GONE_BUG,
    GONE_GUEST,
    GONE_HOST,
    GONE_MASK,
    GONE_MIGRATION,
    GONE_NEVER,
    GONE_SHIFT,
    PIN_MASK,
    SKIPPED,
    has_diverged,
)
from spepolicy.machine.pagetables import va_leaf
from spepolicy.machine.rows import (
    dirty,
    frames,
    host_page,
    log_rows,
    outcome_events,
    outcome_function,
    outcome_type,
    params,
    pool,
    stages,
    tlb,
    truth_row,
    unseen,
    vcpu_row,
    walk_row,
)
from spepolicy.machine.scenario import WROTE
from spepolicy.machine.spu_events import (
    CAUSE_GUEST,
    CAUSE_HOST,
    CAUSE_KVM_BUG,
    CAUSE_MIGRATION,
    CAUSE_NOT_PINNED,
    external_abort,
    fault,
    lose_behind_fault,
    not_allowed,
    stop,
)
from spepolicy.machine.state import DIVERGED, STRAY, LostCause, Machine
from spepolicy.machine.trace import DROPPED, FILTERED, WRITTEN, ZERO, latencies, log_at
from spepolicy.mmu.memory import NO_ZERO_RANGES
from spepolicy.mmu.walker import FSC_MASK, MARK_DIRTY, OA_MASK, PHYSICAL, VALID, WRITE, translate

_FULL = int(LostCause.BUFFER_FULL)
_GUEST_ERROR = int(LostCause.GUEST_ERROR)
_ABORT = int(LostCause.EXTERNAL_ABORT)
_DIGEST = 0x1E37_79B9_7F4A_7C15  # odd, so that multiplication loses nothing
_ABORT_DRAWS = 1 << 41  # counters of the stream of samples that no sample uses

# Bytes of a record before padding, without context and PA packets (spe.md 4.6), by the low bits of OpType: B, LD, ST.
_SIZES = (36, 45, 45, 45, 43, 45, 45, 45)
_ACCESS_FLAG = 0b001000  # FSC without the level (spe.md 1.8)
_ACCESS = 6  # OpType.LOAD | OpType.STORE

_L1D_REFILL, _LLC_ACCESS, _LLC_MISS, _REMOTE = 1 << 3, 1 << 8, 1 << 9, 1 << 10


@jit
def record_bytes(par: Any, kind: int) -> int:
    """Return the size of a record for an operation type, padded to PMBIDR_EL1.Align (rules 17, 24, 26 and 27)."""
    if par.align_bytes == par.max_record_bytes:
        return par.max_record_bytes
    size = _SIZES[kind & 7] + par.context_bytes
    if kind & _ACCESS != 0:
        size += par.access_bytes
    size = (size + par.align_bytes - 1) & ~(par.align_bytes - 1)
    return min(size, par.max_record_bytes)


@jit
def data_source(events: int) -> int:
    """Return the Data Source packet of a load with these events, as Neoverse cores number them (spe.md 4.5)."""
    if events & _REMOTE != 0:
        return 0xD
    if events & _LLC_MISS != 0:
        return 0xE
    if events & _LLC_ACCESS != 0:
        return 0xB
    return 8 if events & _L1D_REFILL != 0 else 0


@jit
def rejected(v: Any, kind: int, events: int, latency: int) -> bool:
    """Apply the filters, which are ANDed (rules 19 and 20).

    Where a filter is on and selects nothing it is as if it were off (rule 21). Mask bits of PMSFCR_EL1 are RES0 without
    FEAT_SPE_EFT, and the filter is then the plain one: any of the types selected.
    """
    if v.pmsfcr & PMSFCR_FT != 0:
        control = (v.pmsfcr >> PMSFCR_TYPE_SHIFT) & 31
        mask = (v.pmsfcr >> PMSFCR_MASK_SHIFT) & 31
        if control & ~mask != 0 and kind & control & ~mask == 0:
            return True
        if kind & mask != control & mask:
            return True
    if v.pmsfcr & PMSFCR_FE != 0 and events & v.pmsevfr != v.pmsevfr:
        return True
    if v.pmsfcr & PMSFCR_FNE != 0 and events & v.pmsnevfr != 0:
        return True
    if v.pmsfcr & PMSFCR_FDS != 0 and kind & _ACCESS == 2 and (v.pmsdsfr >> data_source(events)) & 1 == 0:
        return True
    return v.pmsfcr & PMSFCR_FL != 0 and latency < v.pmslatfr


@jit
def find_page(m: Machine, i: int, k: int, va: int) -> int:
    """Make the page of *va* the one in v.tlb_page, walking on a TLB miss. Return 0, the walk's status, or
    FSC_EXTERNAL_ABORT where no memory is.

    With PMBLIMITR_EL1.nVM, which the guest sets only where PMSCR_EL2.EnVM lets it, *va* is an IPA, or a PA where there
    is no stage 2, and stage 1 is off for the SPU (rule 50).
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    page = va >> 12
    if par.own_buffer != 0:
        # Rule 30: the owner's regime, EL2&0, whose tables map KVM's own buffer for good.
        v.tlb_page = page
        return 0
    e = page & par.tlb_mask
    if tlb(m, i, k)[e, 0] != page:
        # Privileged even at EL0, and PAN does not count (rule 30).
        w = walk_row(m, i)
        physical = v.pmblimitr & PMBLIMITR_NVM
        access = WRITE | MARK_DIRTY | (PHYSICAL if physical != 0 else 0)
        translate(frames(m, i), pool(m, i), NO_ZERO_RANGES, stages(m, i), w, va, access)
        tr.walks += 1
        tr.walk_reads += w.reads
        pa = w.pa
        ipa = w.address
        if w.status != 0:
            tr.fault_cause = _true_cause(m, i, w.status, ipa)
            return w.status
        guest_page = (ipa >> 12) - par.ram_page0
        if guest_page < 0 or guest_page >= par.ram_pages:
            # A device's memory: what comes of a record there is CONSTRAINED UNPREDICTABLE (rule 35); here it aborts.
            tr.fault_cause = CAUSE_GUEST
            return FSC_EXTERNAL_ABORT
        tlb(m, i, k)[e, 0] = page
        tlb(m, i, k)[e, 1] = pa >> 12
        tlb(m, i, k)[e, 2] = ipa >> 12
        backing = host_page(m, i)[guest_page]
        diverged = DIVERGED if has_diverged(backing, pa >> 12) else 0
        if physical != 0 and _behind_ring(m, i, v, va) != ipa >> 12:
            diverged |= STRAY
        tlb(m, i, k)[e, 3] = diverged
        tr.diverged_pages += diverged & DIVERGED
    if par.migration_kind != 0:
        dirty(m, i)[tlb(m, i, k)[e, 2] - par.ram_page0] |= WROTE
    tr.diverged_now = tlb(m, i, k)[e, 3]
    v.tlb_page = page
    return 0


@jit
def _behind_ring(m: Machine, i: int, v: Any, address: int) -> int:
    """Return the IPA page in which the guest's CPU will look for what the SPU writes to the physical *address*."""
    slot, entry, _reads = va_leaf(m, i, v.buffer_va + (address - v.buffer_base))
    if slot < 0 or pool(m, i)[slot, entry] & VALID == 0:
        return -1
    return (pool(m, i)[slot, entry] & OA_MASK) >> 12


@jit
def _true_cause(m: Machine, i: int, status: int, ipa: int) -> int:
    """Say why stage 2 has no usable entry: only the judge is told."""
    par = params(m, i)
    page = (ipa >> 12) - par.ram_page0
    if page < 0 or page >= par.ram_pages:
        return CAUSE_GUEST  # the guest's own tables point outside its memory
    if status & FSC_MASK & ~3 == _ACCESS_FLAG:
        return CAUSE_HOST  # KVM maps with AF=1; only the host's ageing clears it (kvm_age_gfn)
    word = host_page(m, i)[page]
    gone = (word & GONE_MASK) >> GONE_SHIFT
    if gone == GONE_HOST:
        return CAUSE_HOST
    if gone == GONE_GUEST:
        return CAUSE_GUEST
    if gone == GONE_BUG or (gone == GONE_NEVER and word & SKIPPED != 0 and word & PIN_MASK == 0):
        return CAUSE_KVM_BUG
    return CAUSE_MIGRATION if gone == GONE_MIGRATION else CAUSE_NOT_PINNED


@jit
def _refused(m: Machine, i: int, k: int, status: int, address: int, end: int, cut: int, at_ps: int) -> bool:
    """The page of *address* cannot be written, for *status* (see find_page). Return True if that stopped the SPU."""
    if status == FSC_EXTERNAL_ABORT:
        return external_abort(m, i, k, _GUEST_ERROR, address, end, cut, at_ps)
    return fault(m, i, k, status, address, cut, at_ps)


@jit
def complete(m: Machine, i: int, k: int, at_ps: int) -> bool:
    """The operation in flight is done: filter its record and write it. Return True if that stopped the SPU."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.flight = 0
    outcome = v.flight_outcome
    kind = outcome_type(m)[outcome]
    if v.pmsfcr != 0 and rejected(v, kind, outcome_events(m)[outcome], min(v.flight_latency, par.latency_max)):
        tr.filtered += 1
        log_at(m, i, k, at_ps, FILTERED, ZERO, ZERO, ZERO)
        return False
    tr.survived += 1
    if v.pmblimitr & PMBLIMITR_FM == PMBLIMITR_DISCARD:
        # Rule 23: filtered and counted like any, and then dropped; pointers mean nothing.
        tr.discarded += 1
        log_at(m, i, k, at_ps, DROPPED, ZERO, ZERO, ZERO)
        return False
    if v.late_syndrome != 0:
        return lose_behind_fault(m, i, k, at_ps)
    size = record_bytes(par, kind)
    pointer = v.pmbptr
    if pointer > (v.pmblimitr & PMBLIMITR_LIMIT) - par.max_record_bytes:
        not_allowed(m, i, k, at_ps)
        return True
    if pointer >> 12 != v.tlb_page:
        status = find_page(m, i, k, pointer)
        if status != 0:
            return _refused(m, i, k, status, pointer, pointer + size, 0, at_ps)
    if (pointer + size - 1) >> 12 != v.tlb_page:
        # Rule 29: bytes are written one after the other, so the first byte on the next page is where it stops.
        boundary = ((pointer >> 12) + 1) << 12
        status = find_page(m, i, k, boundary)
        if status != 0:
            return _refused(m, i, k, status, boundary, pointer + size, 1, at_ps)
    every = par.external_abort_every
    if every != 0 and draw(v.key_sample, v.sample_draws + _ABORT_DRAWS) % every == 0:
        return external_abort(m, i, k, _ABORT, pointer, pointer + size, 0, at_ps)
    v.pmbptr = pointer + size
    if log_rows(m, i).shape[0] != 0:
        log_at(m, i, k, at_ps, WRITTEN, size, pointer, latencies(m, i, k))
    book(tr, 1)
    unseen(m, i, k)[outcome_function(m)[outcome]] += 1
    tr.digest = (tr.digest ^ word(outcome, v.flight_latency, pointer)) * _DIGEST
    if v.pmbptr > (v.pmblimitr & PMBLIMITR_LIMIT) - par.max_record_bytes:
        tr.buffer_full += 1
        stop(m, i, k, (EC_OTHER << PMBSR_EC_SHIFT) | BSC_FULL, at_ps, _FULL)
        return True
    return False


@jit
def word(outcome: int, latency: int, pointer: int) -> int:
    """Condense a record to what two runs must agree on to have written the same one."""
    return (outcome << 40) ^ (latency << 24) ^ (pointer & 0xFF_FFFF)


@jit
def book(tr: Any, written: int) -> None:
    """Count records that are in the buffer."""
    tr.written += written
    tr.pending += written
    if tr.diverged_now != 0:
        tr.diverged_records += written * (tr.diverged_now & 1)
        tr.stray_records += written * (tr.diverged_now >> 1)
