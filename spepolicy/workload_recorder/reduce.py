"""From the counts of a run to a workload: functions, phases, operation mix, memory behaviour, time.

*Counted*: operations by type, branches, which level of the modelled caches serves an access, system calls; of one
access in a hundred or so, its address (`spepolicy.workload_data` says what is kept of them).

*Modelled*: time, for an emulator has none. Intervals between misses as Karkhanis and Smith describe them ("A
first-order superscalar processor model", ISCA 2004): an operation takes a third of a cycle; a mispredicted branch
adds its latency; a load from the system level cache or memory, with none under way before it, holds the core up once
128 operations are behind it, and others meanwhile cost nothing; but a load whose address comes from one under way
adds its latency in full.

*Assumed*: system calls take 2 us each, and what the kernel does in them: user-mode emulation has no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.machine.scenario import Cpu
from spepolicy.workload_model import COUNTED, NO_SYSCALLS, Accesses, FunctionCounts, PhaseCounts, describe, phases_of
from spepolicy.workload_recorder.raw import COLUMNS, Raw
from spepolicy.workload_recorder.symbols import Functions, read_functions

__all__ = ["describe_run", "functions_of", "regions_of"]

DISPATCH = 3  # operations per cycle where nothing waits (assumption; range 2..4, a Neoverse N1 dispatches four)
IN_FLIGHT = 128  # operations that a Neoverse N1 holds
SYSCALL_NS = 2000  # assumption; range 0.2..20 us
NS_PER_CYCLE = Cpu.cycle_ps / 1000
_AT = {name: index for index, name in enumerate(COLUMNS)}


def functions_of(raw: Raw) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Return the names of functions, and the index of its function for each row of *raw*, and for each access."""
    files: dict[str, Functions] = {}
    lines, where = np.unique(np.concatenate([raw.line, raw.accesses["line"]]), return_inverse=True)
    index: dict[str, int] = {}
    of_line = np.empty(len(lines), np.int64)
    for n, line in enumerate(lines.tolist()):
        # Code of two functions in 64 bytes counts for the first.
        of_line[n] = index.setdefault(_name(line << 6, raw, files), len(index))
    rows = len(raw.line)
    return list(index), of_line[where[:rows]], of_line[where[rows:]]


def _name(address: int, raw: Raw, files: dict[str, Functions]) -> str:
    for mapping in raw.mappings:
        if mapping.begin <= address < mapping.end:
            if mapping.path not in files:
                files[mapping.path] = read_functions(Path(mapping.path))
            # The last byte of the line: a function that begins within it has most of what follows.
            return files[mapping.path].at(address - mapping.begin + mapping.file_offset + 63)
    return "(code of no file)"


def describe_run(
    raw: Raw, latencies: Mapping[str, Mapping[str, int]], source: str, most_phases: int = 6
) -> dict[str, Any]:
    """Return the description of a run as a workload, its section `latencies` being *latencies*."""
    names, function, accessing = functions_of(raw)
    intervals = len(raw.instructions)
    instructions = raw.count[:, _AT["instructions"]]
    shares = np.zeros((intervals, len(names)))
    np.add.at(shares, (raw.interval, function), instructions)
    totals = np.zeros((len(names), len(COLUMNS)), np.int64)
    np.add.at(totals, function, raw.count)
    mean = {kind: part["cycles"] + part["spread"] for kind, part in latencies.items()}
    functions = {
        name: _function(dict(zip(COLUMNS, row.tolist(), strict=True)), mean)
        for name, row in zip(names, totals, strict=True)
    }
    cycles = np.array([functions[name].cycles_per_op for name in names])
    phases = []
    for begin, end in phases_of(shares, most_phases):
        operations = shares[begin:end].sum(axis=0)
        length_ns = float(operations @ cycles) * NS_PER_CYCLE
        syscalls = int(raw.syscalls[begin:end].sum())
        phases.append(
            PhaseCounts(
                user={name: float(part) for name, part in zip(names, operations, strict=True) if part > 0},
                length_ns=length_ns,
                syscall_gap_ns=length_ns / syscalls if syscalls else NO_SYSCALLS * length_ns,
                syscall_ns=SYSCALL_NS,
            )
        )
    accesses = raw.accesses
    kind = 2 * (1 - accesses["load"].astype(np.int64)) + accesses["miss"]
    data = Accesses(names, accessing, kind, accesses["address"], regions_of(raw))
    return describe(source, latencies, phases, functions, data)


def regions_of(raw: Raw) -> dict[str, tuple[int, int]]:
    """Return begin and bytes of the parts of memory that were accessed, by the name that perf gives them.

    The emulator's own memory lies beside the program's, so the stack is the anonymous mapping that is accessed by the
    stack pointer most, the heap what brk() has moved, and the rest of what is accessed lies in files or is anonymous.
    """
    addresses = np.sort(raw.accesses["address"])
    by_stack_pointer = np.sort(raw.accesses["address"][raw.accesses["by_stack_pointer"]])

    def inside(of: NDArray[np.uint64], begin: int, end: int) -> int:
        first, last = np.searchsorted(of, np.array([begin, end], np.uint64))
        return int(last - first)

    parts = [("[heap]", *raw.heap)]
    stack = max(raw.anonymous, key=lambda m: inside(by_stack_pointer, m.begin, m.end), default=None)
    if stack is not None and inside(by_stack_pointer, stack.begin, stack.end):
        parts.append(("[stack]", stack.begin, stack.end))
    parts += [(Path(m.path).name, m.begin, m.end) for m in raw.mappings]
    parts += [("anon", m.begin, m.end) for m in raw.anonymous if m is not stack]
    found: dict[str, tuple[int, int]] = {}
    for name, begin, end in parts:
        count = inside(addresses, begin, end)
        if not count or any(b < end and begin < b + size for b, size in found.values()):
            continue
        taken = sum(1 for known in found if known.split(" ")[0] == name)
        found[f"{name} {taken + 1}" if taken else name] = (begin, end - begin)
    return found


def _function(count: Mapping[str, int], mean: Mapping[str, float]) -> FunctionCounts:
    """Return the counts of a function, with the time that an operation takes by the model above."""
    operations = max(count["instructions"], 1)
    typed = sum(count[name] for name in ("load", "store", "atomic", "branch"))
    stall = count["mispredict"] * mean["mispredict"]
    held = operations * mean["other"]  # cycles that operations are in flight, all together
    for level in ("l2", "llc", "dram"):
        stall += count[f"waits_{level}"] * mean[level]
        stall += count.get(f"leads_{level}", 0) * max(mean[level] - IN_FLIGHT / DISPATCH, 0)
        held += count[level] * mean[level]
    held += (count["load"] + count["atomic"]) * mean["l1"]
    cycles = max(1 / DISPATCH + stall / operations, held / operations / IN_FLIGHT)
    counted = {name: float(part) for name, part in count.items() if name in COUNTED}
    counted["other"] = float(max(operations - typed, 0))
    # Operations wait for operands while those before them do: eight of them ahead on average (assumption; range 2..16).
    wait = min(round(8 * cycles), round(max(IN_FLIGHT * cycles * 0.8 - held / operations, 0)))
    return FunctionCounts(counted, cycles, wait)
