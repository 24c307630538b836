"""The Statistical Profiling Unit: sampling, filtering, writing records, and stopping. Rules are numbered as in spe.md
section 2.
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import (
    BSC_FULL,
    EC_OTHER,
    EC_STAGE1,
    EC_STAGE2,
    FSC_EXTERNAL_ABORT,
    PMBLIMITR_E,
    PMBLIMITR_LIMIT,
    PMBSR_COLL,
    PMBSR_DL,
    PMBSR_EA,
    PMBSR_EC_SHIFT,
    PMBSR_S,
    PMSCR_E0SPE,
    PMSCR_E1SPE,
    PMSFCR_FE,
    PMSFCR_FL,
    PMSFCR_FT,
    PMSFCR_TYPE_SHIFT,
    PMSIRR_INTERVAL,
    PMSIRR_RND,
)
from spepolicy.jit import jit
from spepolicy.machine.draw import draw
from spepolicy.machine.host import (
    FRAME,
    GONE_BUG,
    GONE_GUEST,
    GONE_HOST,
    GONE_MASK,
    GONE_MIGRATION,
    GONE_NEVER,
    GONE_SHIFT,
    HOLE,
    PIN_MASK,
    SKIPPED,
)
from spepolicy.machine.rows import (
    alias_outcome,
    alias_threshold,
    dirty,
    exponential,
    frames,
    host_page,
    log_rows,
    lost,
    outcome_events,
    outcome_function,
    outcome_latency,
    outcome_spread,
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
from spepolicy.machine.state import LostCause, Machine
from spepolicy.machine.trace import (
    COLLIDED,
    FILTERED,
    LOST,
    STOPPED,
    WRITTEN,
    ZERO,
    latencies,
    log,
    log_at,
    log_selection,
)
from spepolicy.mmu.memory import NO_ZERO_RANGES
from spepolicy.mmu.walker import FSC_MASK, MARK_DIRTY, STAGE2, WRITE, translate

_FULL = int(LostCause.BUFFER_FULL)
_STAGE1 = int(LostCause.STAGE1_FAULT)
_DIGEST = 0x1E37_79B9_7F4A_7C15  # odd, so that multiplication loses nothing
_NOT_PINNED = int(LostCause.STAGE2_NOT_PINNED)
_GUEST = int(LostCause.STAGE2_GUEST)
_HOST = int(LostCause.STAGE2_HOST)
_MIGRATION = int(LostCause.STAGE2_MIGRATION)
_GUEST_ERROR = int(LostCause.GUEST_ERROR)
_KVM_BUG = int(LostCause.STAGE2_KVM_BUG)

# True causes as spepolicy.hookspecs.Cause numbers them.
_CAUSE_NOT_PINNED = 1
_CAUSE_GUEST = 2
_CAUSE_HOST = 3
_CAUSE_MIGRATION = 5
_CAUSE_KVM_BUG = 4

# Bytes of a record before padding, without context and PA packets (spe.md 4.6), by OpType & 7.
_SIZES = (36, 45, 45, 45, 43, 45, 45, 45)


@jit
def profiling_enabled(v: Any) -> bool:
    """StatisticalProfilingEnabled() at the current exception level for an EL1-owned buffer (rules 3 and 4)."""
    bit = PMSCR_E1SPE if v.level == 1 else PMSCR_E0SPE
    return v.pmscr & bit != 0 and v.pmblimitr & PMBLIMITR_E != 0 and v.pmbsr & PMBSR_S == 0 and v.spe_off == 0


@jit
def record_bytes(par: Any, kind: int) -> int:
    """Return the size of a record for an operation type, padded to PMBIDR_EL1.Align (rule 27)."""
    if par.align_bytes == par.max_record_bytes:
        return par.max_record_bytes
    size = _SIZES[kind]
    size = (size + par.align_bytes - 1) & ~(par.align_bytes - 1)
    return min(size, par.max_record_bytes)


@jit
def rejected(v: Any, kind: int, events: int, latency: int) -> bool:
    """Apply the event, type and latency filters, which are ANDed (rules 19 and 20, without FEAT_SPE_EFT)."""
    if v.pmsfcr & PMSFCR_FT != 0 and (v.pmsfcr >> PMSFCR_TYPE_SHIFT) & 7 & kind == 0:
        return True
    if v.pmsfcr & PMSFCR_FE != 0 and events & v.pmsevfr != v.pmsevfr:
        return True
    return v.pmsfcr & PMSFCR_FL != 0 and latency < v.pmslatfr


@jit
def stop(par: Any, v: Any, syndrome: int, at_ps: int, cause: int) -> None:
    """A buffer management event: S=1, profiling stops, PMBIRQ is on its way (rules 37, 38, 46)."""
    v.pmbsr = (v.pmbsr & (PMBSR_COLL | PMBSR_DL)) | PMBSR_S | syndrome
    v.stop_ps = at_ps
    v.stop_cause = cause
    v.event_seen = 0
    v.irq_ps = at_ps + par.irq_latency_ps
    hold_counter(v, at_ps)


@jit
def hold_counter(v: Any, at_ps: int) -> None:
    """Profiling is no longer enabled: the interval counter keeps what is left (rule 13)."""
    if v.counting != 0:
        v.left_ops = max((v.select_ps - at_ps + v.rate_ps - 1) // v.rate_ps, 1)
        v.counting = 0


@jit
def run_counter(v: Any, rate_ps: int) -> None:
    """Profiling is enabled, and operations take *rate_ps* each: let the counter run on from what it holds (rule 9)."""
    if v.counting != 0:
        if v.rate_ps == rate_ps:
            return
        hold_counter(v, v.now_ps)
    if v.left_ops == 0:
        # PMSICR_EL1 is 0, as software leaves it before a session: load the interval.
        v.left_ops = v.pmsirr & PMSIRR_INTERVAL
        if v.pmsirr & PMSIRR_RND != 0:
            v.left_ops += draw(v.key_sample, v.sample_draws) & 0xFF
            v.sample_draws += 1
    v.select_ps = v.now_ps + v.left_ops * rate_ps
    v.rate_ps = rate_ps
    v.counting = 1


@jit
def find_page(m: Machine, i: int, k: int, va: int) -> int:
    """Make the page of *va* the one in v.tlb_page, walking on a TLB miss. Return 0 or the walk's status."""
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
        translate(frames(m, i), pool(m, i), NO_ZERO_RANGES, stages(m, i), w, va, WRITE | MARK_DIRTY)
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
            tr.fault_cause = _CAUSE_GUEST
            return FSC_EXTERNAL_ABORT
        tlb(m, i, k)[e, 0] = page
        tlb(m, i, k)[e, 1] = pa >> 12
        tlb(m, i, k)[e, 2] = ipa >> 12
        word = host_page(m, i)[guest_page]
        diverged = 1 if word & HOLE != 0 or word & FRAME != pa >> 12 else 0
        tlb(m, i, k)[e, 3] = diverged
        tr.diverged_pages += diverged
    if par.migration_kind != 0:
        dirty(m, i)[tlb(m, i, k)[e, 2] - par.ram_page0] |= WROTE
    tr.diverged_now = tlb(m, i, k)[e, 3]
    v.tlb_page = page
    return 0


@jit
def _true_cause(m: Machine, i: int, status: int, ipa: int) -> int:
    """Say why stage 2 has no usable entry: only the judge is told."""
    par = params(m, i)
    page = (ipa >> 12) - par.ram_page0
    if page < 0 or page >= par.ram_pages:
        return _CAUSE_GUEST  # the guest's own tables point outside its memory
    word = host_page(m, i)[page]
    gone = (word & GONE_MASK) >> GONE_SHIFT
    if gone == GONE_HOST:
        return _CAUSE_HOST
    if gone == GONE_GUEST:
        return _CAUSE_GUEST
    if gone == GONE_BUG or (gone == GONE_NEVER and word & SKIPPED != 0 and word & PIN_MASK == 0):
        return _CAUSE_KVM_BUG
    return _CAUSE_MIGRATION if gone == GONE_MIGRATION else _CAUSE_NOT_PINNED


@jit
def _fault(m: Machine, i: int, k: int, status: int, address: int, cut: int, at_ps: int) -> None:
    """An MMU fault on a buffer write: the sample is lost, PMBPTR is the faulting address (rules 38 to 40)."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.pmbptr = address
    syndrome = status & FSC_MASK
    if status & STAGE2 != 0:
        syndrome |= EC_STAGE2 << PMBSR_EC_SHIFT
        cause = _HOST
        if tr.fault_cause == _CAUSE_NOT_PINNED:
            cause = _NOT_PINNED
        elif tr.fault_cause == _CAUSE_GUEST:
            cause = _GUEST
        elif tr.fault_cause == _CAUSE_MIGRATION:
            cause = _MIGRATION
        elif tr.fault_cause == _CAUSE_KVM_BUG:
            cause = _KVM_BUG
        tr.stage2_faults += 1
    elif status == FSC_EXTERNAL_ABORT:
        syndrome |= (EC_STAGE1 << PMBSR_EC_SHIFT) | PMBSR_EA  # rule 42
        cause = _GUEST_ERROR
        tr.external_aborts += 1
    else:
        syndrome |= EC_STAGE1 << PMBSR_EC_SHIFT
        cause = _STAGE1
        tr.stage1_faults += 1
    if cut != 0 or par.data_loss_at_boundary != 0:
        syndrome |= PMBSR_DL
        tr.data_loss += 1
    lost(m, i, k)[cause] += 1
    tr.fault_loss_cause = cause
    stop(par, v, syndrome, at_ps, cause)
    page = (walk_row(m, i).address >> 12) - par.ram_page0 + 1 if status & STAGE2 != 0 else ZERO
    log_at(m, i, k, at_ps, LOST, cause, address, page)
    log_at(m, i, k, at_ps, STOPPED, cause, v.pmbsr, v.pmbptr)
    if status & STAGE2 != 0 and tr.stage2_faults == 1:
        tr.first_fault_ps = at_ps + v.host_ps
        tr.first_fault_va = address
        tr.first_fault_syndrome = v.pmbsr


@jit
def _not_allowed(m: Machine, i: int, k: int, at_ps: int) -> None:
    """PMBPTR_EL1 leaves no room for a record below the limit, which software must not program: of what rule 34 allows,
    this SPU chooses the event "access not allowed" (rule 41).
    """
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    lost(m, i, k)[_GUEST_ERROR] += 1
    tr.data_loss += 1
    log_at(m, i, k, at_ps, LOST, _GUEST_ERROR, v.pmbptr, ZERO)
    stop(params(m, i), v, PMBSR_DL, at_ps, _GUEST_ERROR)
    log_at(m, i, k, at_ps, STOPPED, _GUEST_ERROR, v.pmbsr, v.pmbptr)


@jit
def complete(m: Machine, i: int, k: int, at_ps: int) -> bool:
    """The operation in flight is done: filter its record and write it. Return True if that stopped the SPU."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.flight = 0
    outcome = v.flight_outcome
    kind = outcome_type(m)[outcome] & 7
    if v.pmsfcr != 0 and rejected(v, kind, outcome_events(m)[outcome], min(v.flight_latency, par.latency_max)):
        tr.filtered += 1
        log_at(m, i, k, at_ps, FILTERED, ZERO, ZERO, ZERO)
        return False
    size = record_bytes(par, kind)
    pointer = v.pmbptr
    if pointer > (v.pmblimitr & PMBLIMITR_LIMIT) - par.max_record_bytes:
        _not_allowed(m, i, k, at_ps)
        return True
    if pointer >> 12 != v.tlb_page:
        status = find_page(m, i, k, pointer)
        if status != 0:
            _fault(m, i, k, status, pointer, 0, at_ps)
            return True
    if (pointer + size - 1) >> 12 != v.tlb_page:
        # Rule 29: bytes are written one after the other, so the first byte on the next page is where it stops.
        boundary = ((pointer >> 12) + 1) << 12
        status = find_page(m, i, k, boundary)
        if status != 0:
            _fault(m, i, k, status, boundary, 1, at_ps)
            return True
    v.pmbptr = pointer + size
    if log_rows(m, i).shape[0] != 0:
        log_at(m, i, k, at_ps, WRITTEN, size, pointer, latencies(m, i, k))
    _book(tr, 1)
    unseen(m, i, k)[outcome_function(m)[outcome]] += 1
    tr.digest = (tr.digest ^ _word(outcome, v.flight_latency, pointer)) * _DIGEST
    if v.pmbptr > (v.pmblimitr & PMBLIMITR_LIMIT) - par.max_record_bytes:
        tr.buffer_full += 1
        stop(par, v, (EC_OTHER << PMBSR_EC_SHIFT) | BSC_FULL, at_ps, _FULL)
        log_at(m, i, k, at_ps, STOPPED, _FULL, v.pmbsr, v.pmbptr)
        return True
    return False


@jit
def sample_until(m: Machine, i: int, k: int, until_ps: int) -> int:
    """Run the SPU of one vCPU, which is profiling, in guest time; return the time reached: *until_ps*, or when it
    stopped.

    The hot loop of the project. What it needs for a record that fits the page it wrote last is held in locals; `_put`
    and `_get` move them to and from the state around everything else, which `complete` does.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    rate = v.rate_ps
    interval = (v.pmsirr & PMSIRR_INTERVAL) + 1
    random_mask = 0xFF if v.pmsirr & PMSIRR_RND != 0 else 0
    threshold = alias_threshold(m)[v.distribution]
    choice = alias_outcome(m)[v.distribution]
    latencies, spreads, table = outcome_latency(m), outcome_spread(m), exponential(m)
    kinds, functions, histogram = outcome_type(m), outcome_function(m), unseen(m, i, k)
    cycle_ps = par.cycle_ps
    fixed = par.max_record_bytes if par.align_bytes == par.max_record_bytes else 0
    logging = log_rows(m, i).shape[0] != 0
    plain = v.pmsfcr == 0 and not logging
    last_start = (v.pmblimitr & PMBLIMITR_LIMIT) - par.max_record_bytes
    key, draws, select, busy, flight = v.key_sample, v.sample_draws, v.select_ps, v.busy_until_ps, v.flight
    outcome, latency, pointer, page, digest = v.flight_outcome, v.flight_latency, v.pmbptr, v.tlb_page, tr.digest
    selected = 0
    written = 0
    collided = 0
    reached = until_ps
    while True:
        if flight != 0 and busy <= until_ps and busy <= select:
            size = fixed if fixed != 0 else record_bytes(par, kinds[outcome] & 7)
            if plain and pointer >> 12 == page and (pointer + size - 1) >> 12 == page and pointer + size <= last_start:
                flight = 0
                histogram[functions[outcome]] += 1
                digest = (digest ^ _word(outcome, latency, pointer)) * _DIGEST
                pointer += size
                written += 1
                continue
            v.sample_draws, v.select_ps, v.busy_until_ps, v.flight = draws, select, busy, flight
            v.flight_outcome, v.flight_latency, v.pmbptr, tr.digest = outcome, latency, pointer, digest
            _book(tr, written)
            written = 0
            if complete(m, i, k, busy):
                reached = busy
                flight = v.flight
                pointer, digest = v.pmbptr, tr.digest
                break
            flight, pointer, page, digest = v.flight, v.pmbptr, v.tlb_page, tr.digest
        elif select <= until_ps:
            bits = draw(key, draws)
            draws += 1
            selected += 1
            at = select
            # Rules 10 and 11: the member that finds COUNT=0 reloads it and is not counted, hence the 1 in interval.
            select = at + (interval + (bits & random_mask)) * rate
            if at < busy:
                # Rule 14: one sample at a time; the new one is dropped. A drain writes the record earlier but the
                # operation still takes its time, so that a world switch does not change which samples collide.
                collided += 1
                if logging:
                    log_at(m, i, k, at, COLLIDED, ZERO, ZERO, ZERO)
                continue
            slot = (bits >> 8) & 0xFF
            outcome = choice[slot, 0] if (bits >> 16) & 0xFF_FFFF < threshold[slot] else choice[slot, 1]
            # An exponential part, cut at ln(1024) times its mean: its slice comes from ten more bits of the same draw.
            latency = latencies[outcome] + ((spreads[outcome] * table[(bits >> 40) & 1023]) >> 20)
            flight = 1
            busy = at + latency * cycle_ps
            if logging:
                log_selection(m, i, k, at, outcome, draws - 1)
        else:
            break
    v.sample_draws, v.busy_until_ps, v.flight = draws, busy, flight
    v.flight_outcome, v.flight_latency, v.pmbptr, tr.digest = outcome, latency, pointer, digest
    if v.counting != 0:
        v.select_ps = select
    _book(tr, written)
    tr.selected += selected
    tr.collided += collided
    if collided != 0:
        v.pmbsr |= PMBSR_COLL
    return reached


@jit
def _word(outcome: int, latency: int, pointer: int) -> int:
    """Condense a record to what two runs must agree on to have written the same one."""
    return (outcome << 40) ^ (latency << 24) ^ (pointer & 0xFF_FFFF)


@jit
def _book(tr: Any, written: int) -> None:
    tr.written += written
    tr.pending += written
    tr.diverged_records += written * (tr.diverged_now & 1)
    tr.stray_records += written * (tr.diverged_now >> 1)


@jit
def drain(m: Machine, i: int, k: int) -> None:
    """PSB CSYNC and DSB: the record of the operation in flight is written now (rules 48 and 49)."""
    v = vcpu_row(m, i, k)
    if v.flight != 0:
        if v.pmblimitr & PMBLIMITR_E != 0 and v.pmbsr & PMBSR_S == 0:
            complete(m, i, k, v.now_ps)
        else:
            # Rule 7: with the buffer disabled or stopped a collected record is discarded.
            v.flight = 0
            lost(m, i, k)[v.stop_cause] += 1
            log(m, i, k, LOST, v.stop_cause, v.pmbptr, ZERO)
