"""The loops that were measured, as workloads of the machine: a body in program order, each operation a function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spepolicy.alias import TABLE_DRAWS, alias_table
from spepolicy.machine.scenario import Workload

OTHER, BRANCH, LOAD, STORE = 0, 1, 2, 4
CYCLE_PS = 333
# Cycles an iteration takes: each of the five words is loaded, incremented and stored, and loaded again in the next
# iteration, which waits for a store to be forwarded. Assumption; it sets only how long a run lasts.
CYCLES_PER_ITERATION = 7
TICK_PS = 4_000_000_000  # timer interrupts at CONFIG_HZ=250, an assumption: they resume the loop anywhere


@dataclass(frozen=True)
class Loop:
    """One loop of the measurements."""

    name: str
    body: tuple[int, ...]

    @property
    def loads(self) -> list[int]:
        """Places of the loads in the body."""
        return [n for n, kind in enumerate(self.body) if kind == LOAD]

    @property
    def stores(self) -> list[int]:
        return [n for n, kind in enumerate(self.body) if kind == STORE]

    @property
    def op_ps(self) -> int:
        """Time of an operation, in ps."""
        return CYCLE_PS * CYCLES_PER_ITERATION // len(self.body)


_ADD_FIVE = (LOAD, OTHER, STORE) * 5
_END = (OTHER, BRANCH)  # subs, bne

# Five words are loaded, incremented and stored in turn; "shifted" has one more add in front (spe_data.md 4b, with the
# order of the instructions from the benchmark's sources).
MEASURED = (
    Loop("offsetted", _ADD_FIVE + _END),
    Loop("shifted", (OTHER, *_ADD_FIVE, *_END)),
)
_L, _S, _O, _B = LOAD, STORE, OTHER, BRANCH
# Fibonacci numbers by words in memory, aligned; 15, 16 and 17 instructions.
ALIGNED = (
    Loop("aligned 15", (_L, _L, _O, _B, _L, _S, _L, _O, _S, _L, _S, _L, _O, _S, _B)),
    Loop("aligned 16", (_L, _L, _O, _B, _L, _S, _L, _L, _O, _S, _L, _S, _L, _O, _S, _B)),
    Loop("aligned 17", (_L, _L, _O, _B, _O, _L, _S, _L, _L, _O, _S, _L, _S, _L, _O, _S, _B)),
)


def workload(loop: Loop, *, ticks: bool) -> Workload:
    """Return *loop* as a program: it runs at EL0 for ever, and with *ticks* the timer interrupts it."""
    count = len(loop.body)
    shares = [
        [TABLE_DRAWS // count + (n < TABLE_DRAWS % count) for n in range(count)] + [0],
        [0] * count + [TABLE_DRAWS],
    ]
    tables = [alias_table(row) for row in shares]
    both = np.array([0, 1])
    one = np.ones(1, dtype=np.int64)
    return Workload(
        function_names=(*(f"{loop.name} {n}" for n in range(count)), "kernel"),
        distribution_names=("loop", "kernel"),
        op_ps=np.array([loop.op_ps, loop.op_ps]),
        alias_threshold=np.stack([table[0] for table in tables]),
        alias_outcome=np.stack([table[1] for table in tables]),
        weight=np.array(shares) / TABLE_DRAWS,
        outcome_function=np.arange(count + 1),
        outcome_type=np.array([*loop.body, OTHER]),
        outcome_events=np.full(count + 1, 0b10),
        outcome_latency_cycles=np.full(count + 1, 5),
        outcome_spread_cycles=np.zeros(count + 1, np.int64),
        phase_user=0 * one,
        phase_kernel=one,
        phase_ps=one * 10**12,
        syscall_gap_ps=one * (TICK_PS if ticks else 4 * 10**12),
        syscall_ps=one * 2_000_000,
        other_user=1,
        other_kernel=1,
        driver=1,
        loop_first=0 * both,
        loop_length=np.array([count, 0]),
        loop_outcome=np.arange(count),
        source="loops of the benchmark in spe_data.md 4b",
    )
