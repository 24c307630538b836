"""From counts of a real program's operations to the description of a workload (`spepolicy.workload`).

A recording of an emulated program (`spepolicy.workload_recorder`) and a capture of SPE records
(`spepolicy.capture_model`) both end here: operations counted by phase and function, with what is known of their
memory accesses, branches and time. What neither can know is added, and said to be an assumption: the kernel's code if
none was seen, the guest's other task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.alias import SLOTS
from spepolicy.workload_data import describe_data

__all__ = [
    "COUNTED",
    "NO_SYSCALLS",
    "REST",
    "Accesses",
    "FunctionCounts",
    "PhaseCounts",
    "describe",
    "phases_of",
    "usual_latencies",
]

_TYPES = ("other", "load", "store", "atomic", "branch")
COUNTED = (*_TYPES, "taken", "mispredict", "store_miss", "l2", "llc", "dram", "remote", "walk")
"""What is counted of a function: operations by type; branches that were taken, and mispredicted; stores that missed
the L1; loads and atomics beyond the L1 by the level that served them, and those of them that walked. A workload has
one set of levels for all accesses of a function: those of its loads, whose latency depends on it."""

REST = "(other code)"
NO_SYSCALLS = 10
"""Gap between system calls, in lengths of the phase, where none was seen. The machine draws a gap when the last one is
over, not when a phase begins, so a gap without end would keep system calls from the phases that follow."""
_LEAST_SHARE = 0.005  # of a phase's operations, that a function must have to be told apart
_LEAST = 0.002  # a level or probability below this is dropped: it would cost outcomes, of which a distribution has 256
_LONGEST_GAP_NS = 4e9  # of what the machine can draw (spepolicy.workload.MAX_MEAN_PS)

# Kernel code in the shape of Linux's system call path, where none was recorded. All of it is an assumption.
_KERNEL = {
    "ipc": 1.1,
    "wait_cycles": 14,
    "walk": 0.05,
    "taken": 0.5,
    "mispredict": 0.02,
    "mix": {"load": 0.26, "store": 0.14, "atomic": 0.02, "branch": 0.19, "other": 0.39},
    "served": {"l1": 0.94, "l2": 0.04, "llc": 0.014, "dram": 0.006},
}
_KERNEL_SHARES = {"el0_svc_common": 0.3, "vfs_read": 0.25, "copy_page_to_iter": 0.25, "do_user_addr_fault": 0.2}


@dataclass
class FunctionCounts:
    """Operations of a function: how many, of which kind, and how long they take."""

    count: dict[str, float]  # by name of `COUNTED`; those beyond the L1 and branches are parts of the operations
    cycles_per_op: float
    wait_cycles: int = 0

    @property
    def operations(self) -> float:
        """How many operations there are, of all types."""
        return sum(self.count.get(name, 0) for name in _TYPES)

    def merged(self, other: FunctionCounts) -> FunctionCounts:
        """Return the counts of both together; times are weighted by operations."""
        mine, its = self.operations, other.operations
        total = max(mine + its, 1)
        return FunctionCounts(
            {name: self.count.get(name, 0) + other.count.get(name, 0) for name in COUNTED},
            (self.cycles_per_op * mine + other.cycles_per_op * its) / total,
            round((self.wait_cycles * mine + other.wait_cycles * its) / total),
        )


@dataclass
class Accesses:
    """A sample of the accesses to data, of which each is as likely to be in it."""

    names: Sequence[str]  # of functions
    function: NDArray[np.int64]  # [n] index in names
    kind: NDArray[np.int64]  # [n] index in spepolicy.machine.data_addresses.KINDS
    address: NDArray[np.uint64]  # [n] VA
    regions: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> VA and bytes


@dataclass
class PhaseCounts:
    """A phase: operations by function at EL0 and in the kernel, and its mean durations."""

    user: dict[str, float]
    length_ns: float
    syscall_gap_ns: float
    syscall_ns: float
    kernel: dict[str, float] = field(default_factory=dict)


def phases_of(shares: NDArray[np.float64], most: int = 6, distance: float = 0.15) -> list[tuple[int, int]]:
    """Split a run into phases: return [begin, end) of intervals that belong together.

    Neighbours whose distributions are closest are joined, again and again, until no two are closer than *distance*
    and at most *most* are left.

    :param shares: [intervals, functions], operations of each function in each interval.
    :param distance: total variation distance, 0 to 1.
    """
    parts = [(i, i + 1) for i in range(len(shares))]
    sums = [row.astype(float) for row in shares]

    def between(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.abs(a / max(a.sum(), 1e-12) - b / max(b.sum(), 1e-12)).sum() / 2)

    gaps = [between(a, b) for a, b in pairwise(sums)]
    while gaps and (len(parts) > most or min(gaps) < distance):
        i = int(np.argmin(gaps))
        parts[i : i + 2] = [(parts[i][0], parts[i + 1][1])]
        sums[i : i + 2] = [sums[i] + sums[i + 1]]
        del gaps[i]
        for j in (i - 1, i):
            if 0 <= j < len(gaps):
                gaps[j] = between(sums[j], sums[j + 1])
    return parts


def describe(
    source: str,
    latencies: Any,
    phases: Sequence[PhaseCounts],
    functions: dict[str, FunctionCounts],
    accesses: Accesses | None = None,
) -> dict[str, Any]:
    """Return the description of a workload, for `spepolicy.workload.build_workload`.

    Each phase keeps as many functions as its distribution can hold outcomes of, those with most operations; the rest
    become one function, `REST`.

    :param latencies: the section `latencies` of the description.
    :param functions: counts of every function that a phase names.
    :param accesses: a sample of the accesses of these functions.
    """
    functions = dict(functions)
    user = [_fitted(phase.user, functions) for phase in phases]
    kernel = [_fitted(phase.kernel, functions, kernel=True) if phase.kernel else {} for phase in phases]
    kept = {name for shares in (*user, *kernel) for name in shares}
    behaviours = {name: _behaviour(functions[name]) for name in functions if name in kept}
    description: dict[str, Any] = {
        "source": source,
        "latencies": latencies,
        "behaviours": {f"of {name}": behaviour for name, behaviour in behaviours.items()},
        "functions": {name: f"of {name}" for name in behaviours},
        "distributions": {},
        "phases": {},
        "other": {"user": "other task", "kernel": "kernel"},
    }
    description["behaviours"]["kernel code"] = _KERNEL
    description["functions"] |= dict.fromkeys(_KERNEL_SHARES, "kernel code") | {"other_task": "kernel code"}
    description["distributions"] |= {"kernel": _KERNEL_SHARES, "other task": {"other_task": 1}}
    for number, (phase, user_shares, kernel_shares) in enumerate(zip(phases, user, kernel, strict=True), 1):
        name = f"phase {number}"
        description["distributions"][name] = user_shares or {"other_task": 1}
        if kernel_shares:
            description["distributions"][f"{name} in the kernel"] = kernel_shares
        description["phases"][name] = {
            "user": name,
            "kernel": f"{name} in the kernel" if kernel_shares else "kernel",
            "length": _duration(phase.length_ns),
            "syscall_gap": _duration(phase.syscall_gap_ns),
            "syscall": _duration(phase.syscall_ns),
        }
    if accesses is not None and len(accesses.address):
        in_kernel = {name for phase in phases for name in phase.kernel if name not in phase.user}
        description |= _data(accesses, kept, in_kernel)
    return description


def _data(accesses: Accesses, kept: set[str], in_kernel: set[str]) -> dict[str, Any]:
    """Return the section `data`, if there is enough to say. What is not a function of its own is in `REST`."""
    rest = {name: _rest(name in in_kernel) for name in accesses.names}
    names = [name if name in kept else rest[name] for name in accesses.names]
    known = {name: n for n, name in enumerate(dict.fromkeys(names))}
    function = np.array([known[name] for name in names], np.int64)[accesses.function]
    cuts = sorted({edge for begin, size in accesses.regions.values() for edge in (begin, begin + size)})
    found = describe_data(list(known), function, accesses.kind, accesses.address, cuts)
    found = {name: kinds for name, kinds in found.items() if name in kept}
    if not found:
        return {}
    regions = {name: f"{begin:#x}+{size}" for name, (begin, size) in accesses.regions.items()}
    return {"data": ({"regions": regions} if regions else {}) | {"functions": found}}


def _duration(nanoseconds: float) -> str:
    microseconds = min(max(nanoseconds, 1.0), _LONGEST_GAP_NS) / 1000
    return f"{round(microseconds)}us" if microseconds >= 1000 else f"{microseconds:.3f}us"


def _rest(kernel: bool) -> str:
    return f"{REST} of the kernel" if kernel else REST


def _fitted(
    operations: dict[str, float], functions: dict[str, FunctionCounts], kernel: bool = False
) -> dict[str, float]:
    """Return shares of the functions with most operations; *functions* gains the sum of the others, if there are
    any.
    """
    rest = _rest(kernel)
    total = sum(operations.values())
    by_size = sorted(operations, key=lambda name: (-operations[name], name))
    kept: list[str] = []
    room = SLOTS - 24  # what the rest may need at most
    for name in by_size:
        room -= _outcomes(_behaviour(functions[name]))
        if room < 0 or operations[name] < total * _LEAST_SHARE:
            break
        kept.append(name)
    left = by_size[len(kept) :]
    shares = {name: operations[name] for name in kept}
    if sum(operations[name] for name in left) >= total * _LEAST:
        shares[rest] = sum(operations[name] for name in left)
        for name in left:
            functions[rest] = functions[rest].merged(functions[name]) if rest in functions else functions[name]
    return rounded(shares)


def rounded(shares: dict[str, float], digits: int = 4) -> dict[str, float]:
    """Return shares with *digits* decimals that sum to 1 exactly; what rounds to nothing is left out."""
    total = sum(shares.values())
    if not total:
        return {}
    units = 10**digits
    whole = {name: round(share / total * units) for name, share in shares.items()}
    largest = max(whole, key=lambda name: whole[name])
    whole[largest] += units - sum(whole.values())
    return {name: value / units for name, value in whole.items() if value > 0}


def _behaviour(function: FunctionCounts) -> dict[str, Any]:
    """Return a function's behaviour as `spepolicy.workload` has it."""
    count = {name: function.count.get(name, 0.0) for name in COUNTED}
    accesses = count["load"] + count["atomic"]
    beyond = {name: count[name] for name in ("l2", "llc", "dram", "remote")}
    if accesses < _LEAST * function.operations:  # as good as none: what stores do is all there is
        accesses, beyond = count["store"], {"l2": count["store_miss"]}
    served = {"l1": max(accesses - sum(beyond.values()), 0), **beyond}
    if accesses:
        served = {name: part for name, part in served.items() if part >= _LEAST * accesses / 10}
    walks = min(count["walk"] / max(sum(beyond.values()), 1), 1)
    mix = rounded({name: count[name] for name in ("load", "store", "atomic", "branch", "other")})
    return {
        "ipc": round(min(max(1 / max(function.cycles_per_op, 1e-9), 0.001), 16), 3),
        "wait_cycles": function.wait_cycles,
        "walk": round(walks, 3) if walks >= _LEAST else 0,
        "taken": round(min(count["taken"] / max(count["branch"], 1), 1), 3),
        "mispredict": round(min(count["mispredict"] / max(count["branch"], 1), 1), 4),
        "mix": mix or {"other": 1},
        "served": (rounded(served) if accesses else {}) or {"l1": 1},
    }


def _outcomes(behaviour: dict[str, Any]) -> int:
    """Return how many outcomes a behaviour has at most in `spepolicy.workload`: kinds of operation that differ."""
    mix = behaviour["mix"]
    directions = (behaviour["taken"] > 0) + (behaviour["taken"] < 1)
    predictions = 1 + (behaviour["mispredict"] > 0)
    walks = behaviour["walk"] > 0
    beyond = sum(level != "l1" for level in behaviour["served"])
    accesses = ("l1" in behaviour["served"]) + beyond * (1 + walks)
    number: int = ("other" in mix) + ("branch" in mix) * directions * predictions
    number += (("load" in mix) + ("atomic" in mix)) * accesses
    number += ("store" in mix) * (1 + (1 + walks) * (beyond > 0))
    return number


def usual_latencies() -> dict[str, dict[str, int]]:
    """Return the section `latencies` of conf/workload/latencies/neoverse.yaml."""
    from importlib.resources import files

    import yaml

    text = (files("spepolicy_conf") / "workload" / "latencies" / "neoverse.yaml").read_text(encoding="utf-8")
    latencies: dict[str, dict[str, int]] = yaml.safe_load(text)
    return latencies
