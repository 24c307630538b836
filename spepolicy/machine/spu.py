"""The Statistical Profiling Unit: when it samples, and what. Rules are numbered as in spe.md section 2.

`spu_write` has what becomes of a sample, `spu_events` how the unit stops, `pick` which operation is chosen.
"""

from __future__ import annotations

from typing import Any

from spepolicy.arch.registers import (
    PMBLIMITR_E,
    PMBLIMITR_FM,
    PMBLIMITR_LIMIT,
    PMBSR_COLL,
    PMBSR_S,
    PMSCR_E0SPE,
    PMSCR_E1SPE,
    PMSIRR_INTERVAL,
    PMSIRR_RND,
)
from spepolicy.jit import cell, jit, widen
from spepolicy.jit import word as element
from spepolicy.machine.draw import draw
from spepolicy.machine.pick import is_plain, pick
from spepolicy.machine.rows import (
    alias_outcome,
    alias_threshold,
    exponential,
    log_rows,
    lost,
    outcome_function,
    outcome_latency,
    outcome_spread,
    outcome_type,
    params,
    truth_row,
    unseen,
    vcpu_row,
)
from spepolicy.machine.spu_events import hold_counter, stop
from spepolicy.machine.spu_write import _DIGEST, book, complete, find_page, record_bytes, rejected, word
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import COLLIDED, LOST, ZERO, log, log_at, log_selection

__all__ = [
    "complete",
    "drain",
    "find_page",
    "hold_counter",
    "profiling_enabled",
    "record_bytes",
    "rejected",
    "run_counter",
    "sample_until",
]


@jit
def profiling_enabled(v: Any) -> bool:
    """StatisticalProfilingEnabled() at the current exception level for an EL1-owned buffer (rules 3 and 4)."""
    bit = PMSCR_E1SPE if v.level == 1 else PMSCR_E0SPE
    return v.pmscr & bit != 0 and v.pmblimitr & PMBLIMITR_E != 0 and v.pmbsr & PMBSR_S == 0 and v.spe_off == 0


@jit
def run_counter(m: Machine, i: int, k: int, rate_ps: int) -> None:
    """Profiling is enabled, and operations take *rate_ps* each: let the counter run on from what it holds (rule 9)."""
    v = vcpu_row(m, i, k)
    if v.counting != 0:
        if v.rate_ps == rate_ps:
            return
        hold_counter(v, v.now_ps)
    if v.left_ops == 0:
        v.ecount_ops = 0
        # PMSICR_EL1 is 0, as software leaves it before a session: load the interval.
        v.left_ops = v.pmsirr & PMSIRR_INTERVAL
        if v.pmsirr & PMSIRR_RND != 0:
            jitter = draw(v.key_sample, v.sample_draws) & 0xFF
            v.sample_draws += 1
            v.left_ops += jitter
            # Rule 12: with the secondary counter the interval itself has no jitter; the sample comes that much later.
            v.ecount_ops = jitter if params(m, i).secondary_counter != 0 else 0
    v.select_ps = v.now_ps + v.left_ops * rate_ps
    v.rate_ps = rate_ps
    v.counting = 1


@jit
def sample_until(m: Machine, i: int, k: int, until_ps: int) -> int:
    """Run the SPU of one vCPU, which is profiling, in guest time; return the time reached: *until_ps*, or when it
    stopped.

    The hot loop of the project. What it needs for a record that fits the page it wrote last is held in locals, which
    are moved to and from the state around everything else, which `complete` does.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    rate = v.rate_ps
    interval = (v.pmsirr & PMSIRR_INTERVAL) + 1
    random_mask = 0xFF if v.pmsirr & PMSIRR_RND != 0 else 0
    secondary_mask = random_mask if par.secondary_counter != 0 else 0
    late = v.ecount_ops
    threshold = alias_threshold(m)[v.distribution]
    choice = alias_outcome(m)[v.distribution]
    latencies, spreads, table = outcome_latency(m), outcome_spread(m), exponential(m)
    kinds, functions, histogram = outcome_type(m), outcome_function(m), unseen(m, i, k)
    cycle_ps = par.cycle_ps
    fixed = par.max_record_bytes if par.align_bytes == par.max_record_bytes else 0
    logging = log_rows(m, i).shape[0] != 0
    plain = (
        v.pmsfcr == 0
        and v.pmblimitr & PMBLIMITR_FM == 0
        and par.external_abort_every == 0
        and v.late_syndrome == 0
        and not logging
    )
    evenly = is_plain(m, i, k)
    last_start = (v.pmblimitr & PMBLIMITR_LIMIT) - par.max_record_bytes
    key, draws, select, busy, flight = v.key_sample, v.sample_draws, v.select_ps, v.busy_until_ps, v.flight
    outcome, latency, pointer, page, digest = v.flight_outcome, v.flight_latency, v.pmbptr, v.tlb_page, tr.digest
    selected = 0
    written = 0
    collided = 0
    reached = until_ps
    while True:
        if flight == 0 or select < busy:
            if select > until_ps:
                break
            bits = draw(key, draws)
            draws += 1
            selected += 1
            at = select
            # Rules 10 and 11: the member that finds COUNT=0 reloads it and is not counted, hence the 1 in interval.
            # Rule 12: what the secondary counter added to the last interval is not part of the next.
            jitter = bits & random_mask
            select = at + (interval + jitter - late) * rate
            late = jitter & secondary_mask
            if at < busy:
                # Rule 14: one sample at a time; the new one is dropped. A drain writes the record earlier but the
                # operation still takes its time, so that a world switch does not change which samples collide.
                collided += 1
                if logging:
                    log_at(m, i, k, at, COLLIDED, ZERO, ZERO, ZERO)
                continue
            slot = (bits >> 8) & 0xFF
            # Computed, not branched on: which of the two it is cannot be predicted.
            outcome = cell(choice, slot, widen((bits >> 16) & 0xFF_FFFF >= element(threshold, slot)))
            if not evenly:
                outcome = pick(m, i, k, at, outcome, draws)
            # An exponential part, cut at ln(1024) times its mean: its slice comes from ten more bits of the same draw.
            slice_of_mean = element(table, (bits >> 40) & 1023)
            latency = element(latencies, outcome) + ((element(spreads, outcome) * slice_of_mean) >> 20)
            flight = 1
            busy = at + latency * cycle_ps
            if logging:
                log_selection(m, i, k, at, outcome, draws - 1)
            if select < busy:
                continue
        if busy > until_ps:
            break
        size = fixed if fixed != 0 else record_bytes(par, element(kinds, outcome))
        if plain and pointer >> 12 == page and (pointer + size - 1) >> 12 == page and pointer + size <= last_start:
            flight = 0
            histogram[element(functions, outcome)] += 1
            digest = (digest ^ word(outcome, latency, pointer)) * _DIGEST
            pointer += size
            written += 1
            continue
        v.sample_draws, v.select_ps, v.busy_until_ps, v.flight = draws, select, busy, flight
        v.flight_outcome, v.flight_latency, v.pmbptr, tr.digest = outcome, latency, pointer, digest
        book(tr, written)
        tr.survived += written
        written = 0
        if complete(m, i, k, busy):
            reached = busy
            flight = v.flight
            pointer, digest = v.pmbptr, tr.digest
            break
        flight, pointer, page, digest = v.flight, v.pmbptr, v.tlb_page, tr.digest
        plain = plain and v.late_syndrome == 0
    v.sample_draws, v.busy_until_ps, v.flight = draws, busy, flight
    v.flight_outcome, v.flight_latency, v.pmbptr, tr.digest = outcome, latency, pointer, digest
    v.ecount_ops = late
    if v.counting != 0:
        v.select_ps = select
    book(tr, written)
    tr.survived += written
    tr.selected += selected
    tr.collided += collided
    if collided != 0:
        v.pmbsr |= PMBSR_COLL
    return reached


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
    if v.late_syndrome != 0:
        # Rule 48: the DSB waits for the writes and for their faults to be reported.
        stop(m, i, k, v.late_syndrome, v.now_ps, v.stop_cause)
