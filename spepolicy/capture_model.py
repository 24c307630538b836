"""A workload from a capture: SPE records of a perf.data file, turned into the description of the program that they
show.

*Taken from the records*: functions (names from symbols of the files that the capture maps, if these files are on this
computer, else a cluster of code), EL0 and kernel, operation mix, branches taken and mispredicted, the level that
served an access, the addresses of data if the records have them (`spepolicy.workload_data` says what is kept), total
latencies by kind of operation and by function, time per operation, phases over time.

*Time per operation*: a record stands for as many operations as the sampling period. The time from the record before it
counts for its function. Pauses, 20 times longer than the median, are left out: another task ran, or records were lost.

*Not in a capture*, so assumed: how long a system call takes (`SYSCALL_NS`; the time between two follows from the
share of time in the kernel), the kernel's code if only EL0 was recorded, the guest's other task. What the capture's
own filters left out (types, events, latency) is missing from the workload too; its source says so. SPE samples some
instructions of a loop more often than others (spe_data.md 4b), and so does the workload.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import CaptureError, ConfigurationError
from spepolicy.spe.operations import is_atomic, is_branch, is_load, is_store
from spepolicy.spe.records import Present
from spepolicy.workload import Events
from spepolicy.workload_model import (
    COUNTED,
    NO_SYSCALLS,
    Accesses,
    FunctionCounts,
    PhaseCounts,
    describe,
    phases_of,
    usual_latencies,
)

if TYPE_CHECKING:
    from spepolicy.perfdata import Capture

__all__ = ["LEAST_RECORDS", "clusters", "describe_capture", "levels_of"]

LEAST_RECORDS = 100  # fewer say nothing about shares: 10 % would be known within 6 points
SYSCALL_NS = 5000  # assumption; range 0.5..50 us
PAUSE = 20  # times the median time between records
WINDOWS = 64  # of equally many records, the finest that phases are told apart
_RARE = 30  # records that a function or a kind must have for a latency of its own
_LEVELS = ("l1", "l2", "llc", "dram", "remote")
_NEOVERSE = {0xD0C, 0xD40, 0xD49, 0xD4F}  # MIDR_EL1.PartNum of N1, V1, N2, V2
# Level of a data source on these (spe.md 4.5). What another core or cluster has comes over the mesh like the LLC's.
_SOURCE_LEVEL = {0x0: 0, 0x8: 1, 0x9: 2, 0xA: 2, 0xB: 2, 0xC: 2, 0xD: 4, 0xE: 3}
_FILTERS = {32: "branches", 33: "loads", 34: "stores"}  # bits of perf_event_attr.config of arm_spe


def describe_capture(capture: Capture, *, thread: int | None = None, cpu_ghz: float | None = None) -> dict[str, Any]:
    """Return the description of a workload, for `spepolicy.workload.build_workload`.

    :param thread: tid of the thread to take; by default the one with most records.
    :param cpu_ghz: clock of the CPU that was recorded, 0.5 to 6, by default 3.
    :raises CaptureError: if fewer than `LEAST_RECORDS` records of the thread have a PC and an operation.
    :raises ConfigurationError: if an argument is out of range.
    """
    ghz = 3.0 if cpu_ghz is None else cpu_ghz
    if not isinstance(ghz, int | float) or isinstance(ghz, bool) or not 0.5 <= ghz <= 6:
        raise ConfigurationError(f"workload.cpu_ghz={cpu_ghz}: must be a number from 0.5 to 6 (GHz). Set 3 if unknown.")
    rows = _rows(capture, thread)
    records, times = capture.records[rows], capture.where["time_ns"][rows]
    functions, function = _functions(capture, records)
    kind, level = _kinds(records, levels_of(capture, records))
    latencies, waits = _latencies(records, kind, level, function, len(functions))
    gaps = _gaps(times)
    period = _period(capture)
    counts = _counts(records, level, function, len(functions))
    cycles = _cycles(gaps, function, len(functions), period, ghz)
    described = {
        name: FunctionCounts(dict(zip(COUNTED, row, strict=True)), float(cycles[n]), int(waits[n]))
        for n, (name, row) in enumerate(zip(functions, counts.tolist(), strict=True))
    }
    phases = _phases(records["pc_el"] > 0, function, functions, gaps, cycles * period / ghz)
    accesses = _accesses(records, level, functions, function)
    return describe(_source(capture, len(records)), latencies, phases, described, accesses)


def _rows(capture: Capture, thread: int | None) -> NDArray[np.int64]:
    """Return the records of the thread that say what they are of, in order of time."""
    needed = int(Present.PC | Present.OPERATION)
    usable = capture.records["present"] & needed == needed
    tids, numbers = np.unique(capture.where["tid"][usable], return_counts=True)
    if thread is not None and thread not in tids:
        known = ", ".join(str(tid) for tid in tids[np.argsort(-numbers)][:8]) or "none"
        raise ConfigurationError(
            f"workload.thread={thread}: {capture.source} has no records of it. Most are of {known}. Set one of "
            "these, or leave it out."
        )
    if len(tids):
        usable &= capture.where["tid"] == (tids[numbers.argmax()] if thread is None else thread)
    if usable.sum() < LEAST_RECORDS:
        raise CaptureError(
            f"{capture.source}: {int(usable.sum())} records of a thread say what was executed where, of "
            f"{len(capture.records)} in all. Rule: a program model needs {LEAST_RECORDS}. Remedy: record longer, or "
            "with a shorter period (perf record -c)."
        )
    order = capture.in_time_order()
    rows: NDArray[np.int64] = order[usable[order]]
    return rows


def _functions(capture: Capture, records: NDArray[Any]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of functions, and for each record the index of its function."""
    pcs, where = np.unique(records["pc"], return_inverse=True)
    names = _symbols(capture, pcs)
    unnamed = np.array([name is None for name in names])
    cluster = clusters(pcs[unnamed])
    for n, start in zip(np.flatnonzero(unnamed).tolist(), cluster.tolist(), strict=True):
        names[n] = _place(capture, start)
    known = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return [str(name) for name in known], np.array([known[name] for name in names], np.int64)[where]


def _symbols(capture: Capture, pcs: NDArray[np.uint64]) -> list[str | None]:
    """Return names from the symbol tables of mapped files that are on this computer, else None."""
    from spepolicy.workload_recorder.symbols import read_functions

    names: list[str | None] = [None] * len(pcs)
    files: dict[int, Any] = {}
    for mapping in capture.maps:
        inside = np.flatnonzero((pcs >= mapping["start"]) & (pcs < mapping["end"]))
        number = int(mapping["name"])
        if len(inside) and number not in files:
            files[number] = read_functions(Path(capture.names[number]))
        for n in inside.tolist():
            found = files[number].at(int(pcs[n]) - int(mapping["start"]) + int(mapping["page_offset"]))
            names[n] = found if files[number].starts and found != files[number].file else None
    return names


def _place(capture: Capture, address: int) -> str:
    """Return the mapped file and the offset in it, or the address if it is in none."""
    for mapping in capture.maps:
        if mapping["start"] <= address < mapping["end"]:
            offset = address - int(mapping["start"]) + int(mapping["page_offset"])
            return f"{Path(capture.names[int(mapping['name'])]).name}+{offset:#x}"
    return f"{address:#x}"


def clusters(pcs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return for each address, sorted, where its cluster of code begins: lines of 64 bytes with gaps of 4 lines at
    most, within a page of 4 KiB.
    """
    lines = pcs >> np.uint64(6)
    new = np.ones(len(lines), bool)
    new[1:] = (np.diff(lines) > 4) | (np.diff(lines >> np.uint64(6)) != 0)
    return (lines[new] << np.uint64(6))[np.cumsum(new) - 1] if len(lines) else lines


def levels_of(capture: Capture, records: NDArray[Any]) -> NDArray[np.int64]:
    """Return the index in (l1, l2, llc, dram, remote) of the level that served each access: by the data source where
    the capture tells that the CPU is one of Arm's Neoverse cores, else by the events.
    """
    events = records["events"]
    level = np.zeros(len(records), np.int64)
    for number, bit in enumerate((Events.L1D_REFILL, Events.LLC_ACCESS, Events.LLC_MISS, Events.REMOTE), 1):
        level[events & int(bit) != 0] = number
    parts = {midr >> 4 & 0xFFF for midr in capture.midr.values() if midr >> 24 == 0x41}
    if parts and parts <= _NEOVERSE:
        told = is_load(records) & (records["present"] & int(Present.DATA_SOURCE) != 0)
        for source, number in _SOURCE_LEVEL.items():
            level[told & (records["data_source"] == source)] = number
    return level


def _kinds(records: NDArray[Any], level: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each record the index in `_KINDS` of what its latency is of, and *level*, 0 for what is no access."""
    branch, store, load = is_branch(records), is_store(records), is_load(records)
    kind = np.zeros(len(records), np.int64)
    kind[branch] = 1
    kind[branch & (records["events"] & int(Events.MISPREDICTED) != 0)] = 2
    kind[store] = 3
    kind[load] = 4 + level[load]
    return kind, np.where(store | load, level, 0)


def _accesses(
    records: NDArray[Any], level: NDArray[np.int64], functions: list[str], function: NDArray[np.int64]
) -> Accesses:
    """Return the loads and stores whose address was recorded."""
    load, store = is_load(records), is_store(records)
    told = (load | store) & (records["present"] & int(Present.VA) != 0)
    kind = 2 * (store & ~load) + (level > 0)
    return Accesses(functions, function[told], kind[told].astype(np.int64), records["va"][told])


_KINDS = ("other", "branch", "mispredict", "store", *_LEVELS)


def _latencies(
    records: NDArray[Any],
    kind: NDArray[np.int64],
    level: NDArray[np.int64],
    function: NDArray[np.int64],
    functions: int,
) -> tuple[dict[str, dict[str, int]], NDArray[np.int64]]:
    """Return the section `latencies`, and for each function the mean wait in cycles that all its operations have more.

    A kind's shortest latency is its 5th percentile; the exponential part is that of the function that waits least.
    """
    latencies = usual_latencies()
    total = records["total_latency"].astype(float)
    known = records["present"] & int(Present.TOTAL) != 0
    plain = known & ~is_atomic(records) & (records["events"] & int(Events.TLB_WALK) == 0)
    expected = np.zeros(len(records))
    for number, name in enumerate(_KINDS):
        of_kind = plain & (kind == number)
        if of_kind.sum() >= _RARE:
            shortest = int(np.percentile(total[of_kind], 5))
            means = [
                total[of_kind & (function == f)].mean() - shortest
                for f in np.flatnonzero(np.bincount(function[of_kind], minlength=functions) >= _RARE)
            ] or [total[of_kind].mean() - shortest]
            latencies[name] = {"cycles": shortest, "spread": max(round(min(means)), 0)}
        expected[kind == number] = sum(latencies[name].values())
    extra = {
        "walk": known & (records["events"] & int(Events.TLB_WALK) != 0) & (level > 0) & ~is_atomic(records),
        "atomic": known & is_atomic(records) & (records["events"] & int(Events.TLB_WALK) == 0),
    }
    for name, chosen in extra.items():
        if chosen.sum() >= _RARE:
            more = max(float((total - expected)[chosen].mean()), 0.0)
            latencies[name] = {"cycles": round(more / 2), "spread": round(more / 2)}
    waits = np.zeros(functions, np.int64)
    number_of = np.bincount(function[plain], minlength=functions)
    sum_of = np.bincount(function[plain], (total - expected)[plain], minlength=functions)
    enough = number_of >= _RARE
    waits[enough] = np.clip(np.rint(sum_of[enough] / number_of[enough]), 0, 1 << 16)
    return latencies, waits


def _counts(
    records: NDArray[Any], level: NDArray[np.int64], function: NDArray[np.int64], functions: int
) -> NDArray[np.int64]:
    """Return int64[functions, COUNTED]."""
    branch, store, load, atomic = is_branch(records), is_store(records), is_load(records), is_atomic(records)
    events = records["events"]
    chosen: Mapping[str, NDArray[np.bool_]] = {
        "other": ~(branch | store | load),
        "load": load & ~atomic,
        "store": store & ~atomic,
        "atomic": atomic,
        "branch": branch,
        "taken": branch & (events & int(Events.NOT_TAKEN) == 0),
        "mispredict": branch & (events & int(Events.MISPREDICTED) != 0),
        "store_miss": store & (level > 0),
        "walk": load & (level > 0) & (events & int(Events.TLB_WALK) != 0),
        **{name: load & (level == number) for number, name in enumerate(_LEVELS) if number},
    }
    columns = [np.bincount(function[chosen[name]], minlength=functions) for name in COUNTED]
    return np.stack(columns, axis=1).astype(np.int64)


def _gaps(times: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Return the ns from the record before to each record, 0 for a pause; None if the capture has no times."""
    if (times < 0).any() or times[-1] <= times[0]:
        return None
    gaps = np.diff(times, prepend=times[0]).astype(float)
    gaps[gaps > PAUSE * np.median(gaps[1:])] = 0
    return gaps


def _period(capture: Capture) -> int:
    """Return the operations that a record stands for; 1 if the file does not tell, and then times mean nothing."""
    return max((event.period for event in capture.events), default=1) or 1


def _cycles(
    gaps: NDArray[np.float64] | None, function: NDArray[np.int64], functions: int, period: int, ghz: float
) -> NDArray[np.float64]:
    """Return the cycles that an operation of each function takes: one, if the capture has no times or no period."""
    if gaps is None or period == 1:
        return np.ones(functions)
    timed = gaps > 0
    overall = gaps[timed].mean() * ghz / period
    number = np.bincount(function[timed], minlength=functions)
    time = np.bincount(function[timed], gaps[timed], minlength=functions) * ghz / period
    # A function with few records is drawn to the mean of all: one gap of another function says little about it.
    cycles: NDArray[np.float64] = np.clip((time + _RARE * overall) / (number + _RARE), 1 / 16, 1000)
    return cycles


def _phases(
    in_kernel: NDArray[np.bool_],
    function: NDArray[np.int64],
    names: list[str],
    gaps: NDArray[np.float64] | None,
    record_ns: NDArray[np.float64],
) -> list[PhaseCounts]:
    """Split the records into phases. *record_ns*: what a record of each function stands for, where there are no
    times.
    """
    spent = record_ns[function] if gaps is None else gaps
    windows = np.arange(len(function)) * min(WINDOWS, max(len(function) // LEAST_RECORDS, 1)) // len(function)
    shares = np.zeros((windows[-1] + 1, 2 * len(names)))
    np.add.at(shares, (windows, function + len(names) * in_kernel), 1)
    phases = []
    for begin, end in phases_of(shares):
        chosen = (windows >= begin) & (windows < end)
        user = np.bincount(function[chosen & ~in_kernel], minlength=len(names))
        kernel = np.bincount(function[chosen & in_kernel], minlength=len(names))
        user_ns, kernel_ns = (float(spent[chosen & side].sum()) for side in (~in_kernel, in_kernel))
        # The machine's phases are EL0 time interrupted by system calls; all in the kernel is EL0 for no time at all.
        phases.append(
            PhaseCounts(
                user={names[n]: float(user[n]) for n in np.flatnonzero(user).tolist()},
                kernel={names[n]: float(kernel[n]) for n in np.flatnonzero(kernel).tolist()},
                length_ns=max(user_ns + kernel_ns, 1.0),
                syscall_gap_ns=SYSCALL_NS * max(user_ns, 1.0) / kernel_ns if kernel_ns else NO_SYSCALLS * user_ns,
                syscall_ns=SYSCALL_NS,
            )
        )
    return phases


def _source(capture: Capture, records: int) -> str:
    """Say what the workload was made of, and what is missing from it."""
    parts = [f"{records:,} SPE records of {Path(capture.source).name}"]
    if capture.machine.get("cpudesc"):
        parts.append(f"recorded on {capture.machine['cpudesc']}")
    for event in capture.events:
        kinds = [name for bit, name in _FILTERS.items() if event.config >> bit & 1]
        if kinds and len(kinds) < len(_FILTERS):
            parts.append(f"only {' and '.join(kinds)} were recorded")
        if event.event_filter or event.inverted_filter or event.min_latency:
            parts.append("only operations with chosen events or latencies were recorded")
    lost = int((capture.aux["flags"] & 1 != 0).sum())
    if lost:
        parts.append(f"{lost} of {len(capture.aux)} AUX records say that samples were lost")
    if not capture.complete:
        parts.append(f"the file has {capture.problem_count} problems")
    return "; ".join(parts)
