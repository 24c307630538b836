"""Build the arrays of `spepolicy.machine.scenario.Workload` from a plain description: composed `conf/workload/*.yaml`.

A description has these sections. A key that is not marked optional is needed, and any other key is an error.

`source`         text: where the numbers come from. It reaches the reports.
`latencies`      what each kind of operation takes, `{cycles: int, spread: int}` in CPU cycles: the shortest total
                 latency, and the mean of an exponential part added to it. Kinds: `other`, `branch`, `mispredict`,
                 `store`; the levels `l1`, `l2`, `llc`, `dram`, `remote`; and `atomic` and `walk`, which are added to
                 the level (or the store) that they concern.
`behaviours`     how a kind of code behaves: `ipc`, operations per cycle; `mix`, the shares of `load`, `store`,
                 `atomic`, `branch` and `other`; `served`, the shares of the levels that serve its loads, stores and
                 atomics; `taken` and `mispredict`, probabilities of its branches; optional `walk`, the probability that
                 an access beyond the L1 also needs a translation table walk; optional `wait_cycles`, the mean of an
                 exponential wait for operands that every operation has.
`functions`      function name -> behaviour name.
`distributions`  name -> {function name: share of the operations executed}.
`phases`         name -> `user` and `kernel`, distributions at EL0 and in system calls; `length`, `syscall_gap` (EL0
                 time between system calls) and `syscall`, mean durations such as 12ms or 2.5us. The program takes the
                 phases in the order written, then starts over.
`other`          distributions `user` and `kernel` of the guest's task that is not profiled.
`driver`         optional: the distribution of the guest's SPE driver. Without it, `DRIVER` below is added.
`data`           optional: which memory the functions access, for the addresses of a record (`spepolicy.workload_data`).

A share that is not written is 0. Shares sum to 1 within 1e-6 and are then scaled to do so exactly.

*Exactness*: numbers are read as the decimals that were written, and all arithmetic is on fractions and integers, so the
same description gives the same bits on every machine. A probability is realised within 2**-32 (`spepolicy.alias`). The
mean time of an operation is rounded to a picosecond: within 0.5 % for code of up to 3 operations per cycle at 3 GHz.

*Events* are bits 1 to 10, which SPEv1p0 has (spe.md 4.3), so that a workload is legal on every version of the
architecture. A store completes into the store buffer: its latency does not depend on the level, and it reports a refill
but nothing beyond the L1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntFlag
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.alias import SLOTS, TABLE_DRAWS, alias_table, apportion, table_counts
from spepolicy.description import Node
from spepolicy.machine.scenario import Cpu, OpType, Workload
from spepolicy.workload_data import build_data

__all__ = ["DRIVER", "Events", "build_workload", "outcome_counts"]

MAX_CYCLES = 1 << 20  # far above a saturated 16-bit counter (spe.md 1.5), far below an overflow of the machine's int64
NS = 1000  # ps
MAX_MEAN_PS = 4 * 10**12  # the machine draws exponential times with means below 2**42 ps (spepolicy.machine.draw)
LEVELS = ("l1", "l2", "llc", "dram", "remote")
OPERATIONS = ("load", "store", "atomic", "branch", "other")
LATENCIES = ("other", "branch", "mispredict", "store", "atomic", "walk", *LEVELS)
ZERO = Fraction(0)


class Events(IntFlag):
    """Bits of the Events packet that a workload sets (spe.md 4.3)."""

    RETIRED = 1 << 1
    L1D_ACCESS = 1 << 2
    L1D_REFILL = 1 << 3
    TLB_ACCESS = 1 << 4
    TLB_WALK = 1 << 5
    NOT_TAKEN = 1 << 6
    MISPREDICTED = 1 << 7
    LLC_ACCESS = 1 << 8
    LLC_MISS = 1 << 9
    REMOTE = 1 << 10


_BEYOND_L1 = Events.LLC_ACCESS | Events.LLC_MISS | Events.REMOTE
_LEVEL_EVENTS = {
    "l1": Events(0),
    "l2": Events.L1D_REFILL,
    "llc": Events.L1D_REFILL | Events.LLC_ACCESS,
    "dram": Events.L1D_REFILL | Events.LLC_ACCESS | Events.LLC_MISS,
    "remote": Events.L1D_REFILL | Events.LLC_ACCESS | Events.LLC_MISS | Events.REMOTE,
}

# Functions are those of Linux 6.18 drivers/perf/arm_spe_pmu.c and kernel/events/ring_buffer.c, on the paths of spe.md
# 3.2 to 3.5. Shares and behaviour are assumptions: short code, slowed by barriers and system registers (ipc 0.2..1), on
# data that is seldom touched.
_DRIVER_SHARES = {
    "arm_spe_pmu_start": 0.17,
    "arm_spe_pmu_stop": 0.12,
    "arm_spe_pmu_irq_handler": 0.13,
    "arm_spe_perf_aux_output_begin": 0.16,
    "arm_spe_pmu_disable_and_drain_local": 0.08,
    "perf_aux_output_begin": 0.16,
    "perf_aux_output_end": 0.18,
}
_DRIVER_CODE = {
    "ipc": 0.5,
    "wait_cycles": 12,
    "walk": 0.05,
    "taken": 0.5,
    "mispredict": 0.03,
    "mix": {"load": 0.26, "store": 0.12, "branch": 0.2, "other": 0.42},
    "served": {"l1": 0.9, "l2": 0.06, "llc": 0.03, "dram": 0.01},
}
DRIVER: dict[str, dict[str, Any]] = {
    "behaviours": {"spe_driver_code": _DRIVER_CODE},
    "functions": dict.fromkeys(_DRIVER_SHARES, "spe_driver_code"),
    "distributions": {"spe_driver": _DRIVER_SHARES},
}


@dataclass(frozen=True)
class _Outcome:
    """One kind of operation, and its share of the operations of a behaviour."""

    op: OpType
    events: int
    cycles: int
    spread: int
    share: Fraction


@dataclass(frozen=True)
class _Behaviour:
    cycles_per_op: Fraction
    outcomes: tuple[_Outcome, ...]


def build_workload(spec: Mapping[str, Any], *, where: str, cycle_ps: int = Cpu.cycle_ps) -> Workload:
    """Build a workload from its description (see the docstring of the module).

    :param spec: plain containers: mappings, text and numbers.
    :param where: what errors call the description, for example the name of its file.
    :param cycle_ps: one CPU cycle in ps. It turns `ipc` into time: pass `cycle_ps` of the `Cpu` that runs the workload.
    :raises ConfigurationError: with *where*, the key, the value, the rule and the remedy.
    """
    section = _sections(Node(spec, "", where))
    source = section["source"].text()
    latencies = {name: _latency(node) for name, node in section["latencies"].fields(LATENCIES).items()}
    behaviours = {name: _behaviour(node, latencies) for name, node in section["behaviours"].entries().items()}
    functions = {
        name: behaviours[node.one_of(behaviours, "behaviour")] for name, node in section["functions"].entries().items()
    }
    distributions = section["distributions"].entries()
    row = {name: d for d, name in enumerate(distributions)}

    tables = [_distribution(node, functions) for node in distributions.values()]
    threshold = np.stack([table[0] for table in tables])
    alias = np.stack([table[1] for table in tables])
    outcomes = [outcome for behaviour in functions.values() for outcome in behaviour.outcomes]
    sizes = [len(behaviour.outcomes) for behaviour in functions.values()]
    counts = table_counts(threshold, alias, len(outcomes))
    phases = np.array([_phase(node, row) for node in section["phases"].entries().values()], np.int64)
    other = section["other"].fields(("user", "kernel"))
    return Workload(
        function_names=tuple(functions),
        distribution_names=tuple(row),
        op_ps=np.array([max(1, round(cycle_ps * table[2])) for table in tables], np.int64),
        alias_threshold=threshold,
        alias_outcome=alias,
        weight=np.add.reduceat(counts, np.cumsum([0, *sizes[:-1]]), axis=1) / TABLE_DRAWS,
        outcome_function=np.repeat(np.arange(len(functions), dtype=np.int64), sizes),
        outcome_type=np.array([int(outcome.op) for outcome in outcomes], np.int64),
        outcome_events=np.array([outcome.events for outcome in outcomes], np.int64),
        outcome_latency_cycles=np.array([outcome.cycles for outcome in outcomes], np.int64),
        outcome_spread_cycles=np.array([outcome.spread for outcome in outcomes], np.int64),
        phase_user=phases[:, 0].copy(),
        phase_kernel=phases[:, 1].copy(),
        phase_ps=phases[:, 2].copy(),
        syscall_gap_ps=phases[:, 3].copy(),
        syscall_ps=phases[:, 4].copy(),
        other_user=row[other["user"].one_of(row, "distribution")],
        other_kernel=row[other["kernel"].one_of(row, "distribution")],
        driver=row[section["driver"].one_of(row, "distribution")],
        source=source,
        data=build_data(section["data"], tuple(functions)) if "data" in section else None,
    )


def outcome_counts(workload: Workload) -> NDArray[np.int64]:
    """Return int64[D, K]: of the 2**32 draws of each distribution's table, how many give each outcome."""
    return table_counts(workload.alias_threshold, workload.alias_outcome, len(workload.outcome_type))


def _sections(description: Node) -> dict[str, Node]:
    """Return the sections, with the built-in SPE driver added if the description has none."""
    needed = ("source", "latencies", "behaviours", "functions", "distributions", "phases", "other")
    section = description.fields(needed, ("driver", "data"))
    if "driver" in section:
        return section
    for name, added in DRIVER.items():
        for entry, node in section[name].entries().items():
            if entry in added:
                raise node.wrong(
                    "that is a name of the built-in SPE driver", "Rename it, or choose a distribution for 'driver'."
                )
        section[name] = Node({**section[name].value, **added}, name, description.where)
    return section | {"driver": Node("spe_driver", "driver", description.where)}


def _latency(node: Node) -> tuple[int, int]:
    part = node.fields(("cycles", "spread"))
    return part["cycles"].whole(0, MAX_CYCLES, "cycles"), part["spread"].whole(0, MAX_CYCLES, "cycles")


def _behaviour(node: Node, latencies: Mapping[str, tuple[int, int]]) -> _Behaviour:
    """Return the outcomes that can occur; their shares sum to 1 exactly."""
    part = node.fields(("ipc", "mix", "served", "taken", "mispredict"), ("walk", "wait_cycles"))
    mix = dict.fromkeys(OPERATIONS, ZERO) | part["mix"].shares(OPERATIONS, "operation")
    served = part["served"].shares(LEVELS, "level")
    taken = part["taken"].number(0, 1, "probability")
    mispredict = part["mispredict"].number(0, 1, "probability")
    walk = part["walk"].number(0, 1, "probability") if "walk" in part else ZERO
    wait = part["wait_cycles"].whole(0, MAX_CYCLES, "cycles") if "wait_cycles" in part else 0

    rows: list[tuple[OpType, Events, tuple[str, ...], Fraction]] = [(OpType.OTHER, Events(0), ("other",), mix["other"])]
    for direction, share in ((Events(0), taken), (Events.NOT_TAKEN, 1 - taken)):
        rows.append((OpType.BRANCH, direction, ("branch",), mix["branch"] * share * (1 - mispredict)))
        wrong = direction | Events.MISPREDICTED
        rows.append((OpType.BRANCH, wrong, ("mispredict",), mix["branch"] * share * mispredict))
    for level, events, extra, share in _accesses(served, walk):
        rows.append((OpType.LOAD, events, (level, *extra), mix["load"] * share))
        # An atomic that returns a value is a load and a store to the type filter (spe.md rule 20).
        rows.append((OpType.LOAD | OpType.STORE, events, (level, "atomic", *extra), mix["atomic"] * share))
        rows.append((OpType.STORE, events & ~_BEYOND_L1, ("store", *extra), mix["store"] * share))

    merged: dict[tuple[OpType, int, int, int], Fraction] = {}
    for op, events, kinds, share in rows:
        cycles = sum(latencies[kind][0] for kind in kinds)
        spread = sum(latencies[kind][1] for kind in kinds) + wait
        key = (op, int(events | Events.RETIRED), cycles, spread)
        merged[key] = merged.get(key, ZERO) + share
    return _Behaviour(
        cycles_per_op=1 / part["ipc"].number(Fraction(1, 1000), 16, "operations per cycle"),
        outcomes=tuple(_Outcome(*key, share) for key, share in merged.items() if share > 0),
    )


def _accesses(
    served: Mapping[str, Fraction], walk: Fraction
) -> Iterator[tuple[str, Events, tuple[str, ...], Fraction]]:
    """Yield the ways in which an access can be served: level, events, further latencies, probability."""
    for level, share in served.items():
        walks = ZERO if level == "l1" else walk
        events = _LEVEL_EVENTS[level] | Events.L1D_ACCESS | Events.TLB_ACCESS
        yield level, events, (), share * (1 - walks)
        yield level, events | Events.TLB_WALK, ("walk",), share * walks


def _distribution(
    node: Node, functions: Mapping[str, _Behaviour]
) -> tuple[NDArray[np.int64], NDArray[np.int64], Fraction]:
    """Return the thresholds [256], the outcomes [256, 2] and the mean cycles per operation of a distribution."""
    shares = dict.fromkeys(functions, ZERO) | node.shares(functions, "function")
    counts = apportion(
        [shares[name] * outcome.share for name, behaviour in functions.items() for outcome in behaviour.outcomes]
    )
    used = sum(count > 0 for count in counts)
    if used > SLOTS:
        raise node.wrong(
            f"it mixes {used} different outcomes (function, operation, events, latency) and can hold {SLOTS}",
            "Give it fewer functions, or behaviours that use fewer levels.",
        )
    cycles = sum((share * functions[name].cycles_per_op for name, share in shares.items()), ZERO)
    return *alias_table(counts), cycles


def _phase(node: Node, row: Mapping[str, int]) -> tuple[int, int, int, int, int]:
    part = node.fields(("user", "kernel", "length", "syscall_gap", "syscall"))
    return (
        row[part["user"].one_of(row, "distribution")],
        row[part["kernel"].one_of(row, "distribution")],
        part["length"].duration(NS, MAX_MEAN_PS),
        part["syscall_gap"].duration(NS, MAX_MEAN_PS),
        part["syscall"].duration(NS, MAX_MEAN_PS),
    )
