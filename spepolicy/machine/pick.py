"""Which operation a selection falls on. By the architecture, the one that finds the interval counter at 0; real cores
choose less evenly.

Three things are configuration (`spepolicy.machine.scenario.Cpu` and `Workload`), all off by default:

*A program whose order matters.* A distribution of the workload may be a loop. The operation is then the one that
executes at the time of the selection, not an independent draw, so an interval can be in step with the loop.

*Granule.* A core renames several operations a cycle, and tags one slot of the group only: the operation picked is the
first of `pick_granule_ops` in a row, counted from where the program began or was last resumed. In a loop of even length
and with a granule of 2 half of the operations are then never sampled, much as on real SPE (spe_data.md 4b); which half
it is may change whenever something interrupts the loop.

*Store slip.* A store is an address and a data micro-operation. Where the one picked has no address to report, a later
operation of the program is tagged in its place, 1 to `store_slip_granules` granules on. That makes stores rarer and
what follows them more frequent.
"""

from __future__ import annotations

from spepolicy.jit import jit
from spepolicy.machine.draw import draw
from spepolicy.machine.rows import (
    alias_outcome,
    alias_threshold,
    loop_first,
    loop_length,
    loop_outcome,
    outcome_type,
    params,
    vcpu_row,
)
from spepolicy.machine.state import Machine

_STORE, _LOAD = 4, 2
_SLIP_DRAWS = 1 << 40  # counters of the stream of samples that no sample uses


@jit
def is_plain(m: Machine, i: int, k: int) -> bool:
    """Tell whether the alias table alone says what is sampled."""
    return params(m, i).store_slip_q16 == 0 and loop_length(m)[vcpu_row(m, i, k).distribution] == 0


@jit
def pick(m: Machine, i: int, k: int, at_ps: int, outcome: int, counter: int) -> int:
    """Return the outcome that a selection at *at_ps* falls on.

    outcome: what the alias table gave. counter: of the draw that made it, from which what is needed here is derived.
    """
    par = params(m, i)
    v = vcpu_row(m, i, k)
    d = v.distribution
    length = loop_length(m)[d]
    bits = draw(v.key_sample, counter + _SLIP_DRAWS)
    slips = bits & 0xFFFF < par.store_slip_q16
    later = ((bits >> 16) & 0xFFFF) % par.store_slip_granules + 1
    if length == 0:
        if slips and outcome_type(m)[outcome] & (_STORE | _LOAD) == _STORE:
            # The order of operations is not known here: a later one is any.
            slot = (bits >> 32) & 0xFF
            draw_2 = draw(v.key_sample, counter + 2 * _SLIP_DRAWS)
            below = draw_2 & 0xFF_FFFF < alias_threshold(m)[d][slot]
            return alias_outcome(m)[d][slot, 0] if below else alias_outcome(m)[d][slot, 1]
        return outcome
    index = at_ps // v.rate_ps
    begin = (v.segment_end_ps - v.segment_ps) // v.rate_ps
    index -= (index - begin) % par.pick_granule_ops
    first = loop_first(m)[d]
    outcome = loop_outcome(m)[first + index % length]
    if slips and outcome_type(m)[outcome] & (_STORE | _LOAD) == _STORE:
        outcome = loop_outcome(m)[first + (index + later * par.pick_granule_ops) % length]
    return outcome
