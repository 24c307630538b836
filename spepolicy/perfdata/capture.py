"""What a perf.data file with SPE in it holds: records, when and by whom, what was lost, what ran, what is damaged.

`read` takes any file that `perf record -e arm_spe_0//` wrote, with AUXTRACE_INFO of version 1 (Linux before 6.15) or 2,
from a file or a pipe, whole or damaged. Nothing is invented: a record is one that its packets spell out, and a field
that the file does not tell is -1 or empty. Two things are done more carefully than perf does them:

* perf joins all AUX data of a queue to one stream, so a record that a buffer management event cut (PMBSR_EL1.DL) merges
  with the next one: fields of the one under the address of the other (spe.md 4.7). Here the stream ends where an AUX
  record with PERF_AUX_FLAG_PARTIAL says that the driver closed its handle, and where AUX data is missing.
* After a byte that is no packet perf goes on with the next byte, and each yields a record. Here
  `spepolicy.spe.packets` finds the next record, and reports what it left out.

Not read: samples of other events, directories (`perf record --threads`), tracepoints' formats.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import CaptureError
from spepolicy.perfdata.clock import ticks_to_ns
from spepolicy.perfdata.collect import Collected, auxtrace_info, collect, machine_of, processors
from spepolicy.perfdata.container import Event, Problem, open_container
from spepolicy.perfdata.layout import TimeConv, Type
from spepolicy.perfdata.stream import NOTHING, Cuts, Decoded, decode_queue, joined
from spepolicy.spe.records import Present

__all__ = ["WHERE", "Capture", "parse", "read"]

WHERE = np.dtype([("time_ns", "i8"), ("queue", "u4"), ("cpu", "i4"), ("tid", "i4")])
"""Beside each record: perf's time, and the queue, CPU and thread; -1: not told."""


@dataclass(frozen=True)
class Capture:
    """A perf.data file with SPE in it. Arrays have one row per record of their kind, in the order of the file.

    The tables from `aux` to `switches` are described in `spepolicy.perfdata.collect`.
    """

    source: str
    records: NDArray[Any]  # spepolicy.spe.records.RECORD[n], queue by queue; `offset` counts bytes of the AUX area
    extra: NDArray[Any]  # spepolicy.spe.records.EXTRA: packets without a field of their own
    where: NDArray[Any]  # WHERE[n]
    aux: NDArray[Any]  # AUX
    lost: NDArray[Any]  # LOST
    errors: NDArray[Any]  # ERROR
    maps: NDArray[Any]  # MAP
    comms: NDArray[Any]  # COMM
    switches: NDArray[Any]  # SWITCH
    names: tuple[str, ...]
    events: tuple[Event, ...]  # the SPE events
    clock: TimeConv | None
    info_version: int  # of AUXTRACE_INFO: 1 or 2
    midr: dict[int, int]  # MIDR_EL1 by CPU (version 2), or under -1 of all CPUs (header feature CPUID)
    machine: dict[str, str]  # hostname, osrelease, version, arch, cpudesc, cpuid, cmdline
    aux_bytes: int  # SPE bytes in the file
    record_counts: dict[str, int]  # records of the container by type
    problems: tuple[Problem, ...]
    problem_count: int  # more than len(problems) if there were very many
    skipped_bytes: int  # of the container and of the SPE streams, that are no part of any record

    @property
    def complete(self) -> bool:
        """Whether nothing was wrong with the file. Of samples that were never recorded `aux` and `lost` tell."""
        return self.problem_count == 0

    def in_time_order(self) -> NDArray[np.int64]:
        """Return the indices of `records` in order of time; what has no time keeps its place before all others."""
        order: NDArray[np.int64] = np.argsort(self.where["time_ns"], kind="stable")
        return order

    def report(self) -> str:
        """Return what was read, lost and wrong, for a terminal."""
        from spepolicy.perfdata.report import report

        return report(self)


def read(path: str | Path) -> Capture:
    """Return what the perf.data file *path* holds.

    Memory: the file and a copy of the AUX data, and for each record 104 bytes (`RECORD`) and 20 (`WHERE`), twice where
    there is more than one queue. That is 5 times the file for records of 64 bytes; the shortest have 3.

    Raises `CaptureError` if the file cannot be opened, is not perf.data, or holds no SPE data at all. Anything less is
    in `Capture.problems`.
    """
    return parse(_load(Path(path)), str(path))


def parse(content: bytes, source: str) -> Capture:
    """Return what the perf.data in *content* holds; *source* is its name in messages. Raises `CaptureError`."""
    got = collect(open_container(memoryview(content), source))
    problems = got.file.problems
    if got.info is None and not got.queues:
        why = f" {problems.count} problems were found, the first: {problems.first[0]}." if problems.first else ""
        raise CaptureError(
            f"'{source}' holds no SPE data: it has no AUXTRACE record of Arm SPE.{why} Record with "
            "'perf record -e arm_spe_0//', and see with 'perf report -D' what a file holds."
        )
    if got.info is None:
        problems.add(-1, "there is no AUXTRACE_INFO: that the AUX data is SPE's is assumed")
    return _decoded(got, got.tables(), source)


def _decoded(got: Collected, tables: dict[str, NDArray[Any]], source: str) -> Capture:
    """Decode the queues and put everything together."""
    cuts, problems = Cuts(tables["aux"]), got.file.problems
    parts, numbers, count = [NOTHING], [np.zeros(0, np.uint32)], 0
    for number, queue in sorted(got.queues.items()):
        if not queue.size:
            continue
        decoded = decode_queue(queue, cuts, problems)
        decoded.extra["record_index"] += np.uint32(count)
        count += len(decoded.records)
        parts.append(decoded)
        numbers.append(np.full(len(decoded.records), number, np.uint32))
    all_of_them = joined(parts)
    version, pmu_types, midr = auxtrace_info(got)
    return Capture(
        source=source,
        records=all_of_them.records,
        extra=all_of_them.extra,
        where=_where(all_of_them, np.concatenate(numbers), got.clock, tables["switches"]),
        **tables,
        names=tuple(got.names),
        events=tuple(event for event in got.file.events if event.kind in pmu_types or not pmu_types),
        clock=got.clock,
        info_version=version,
        midr=processors(got, midr),
        machine=machine_of(got.file),
        aux_bytes=sum(queue.size for queue in got.queues.values()),
        record_counts={Type(kind).name: n for kind, n in sorted(got.counts.items())},
        problems=tuple(problems.first),
        problem_count=problems.count,
        skipped_bytes=all_of_them.skipped_bytes + got.file.skipped_bytes,
    )


def _where(
    decoded: Decoded, queues: NDArray[np.uint32], clock: TimeConv | None, switches: NDArray[Any]
) -> NDArray[Any]:
    """Return WHERE for the records."""
    records = decoded.records
    where = np.zeros(len(records), WHERE)
    where["queue"], where["cpu"], where["tid"], where["time_ns"] = queues, decoded.cpu, decoded.tid, -1
    if clock is not None and clock.multiplier:
        timed = (records["present"] & int(Present.TIMESTAMP)) != 0
        where["time_ns"][timed] = ticks_to_ns(clock, records["timestamp"][timed])
    _threads(records, where, switches)
    return where


def _threads(records: NDArray[Any], where: NDArray[Any], switches: NDArray[Any]) -> None:
    """Set the thread of each record: its context packet, else who its CPU switched to, else the queue's own."""
    known = switches[(switches["time_ns"] >= 0) & (switches["cpu"] >= 0)]
    if len(known):
        known = known[np.lexsort((known["time_ns"], known["cpu"]))]
        running = np.where(known["out"] != 0, known["other"], known["tid"])
        rows = np.flatnonzero((where["time_ns"] >= 0) & np.isin(where["cpu"], known["cpu"]))
        rows = rows[np.argsort(where["cpu"][rows], kind="stable")]  # may be none: switches of CPUs without records
        cpus, first = np.unique(where["cpu"][rows], return_index=True)
        low, high = (np.searchsorted(known["cpu"], cpus, side) for side in ("left", "right"))
        ends = [*first[1:].tolist(), len(rows)]
        for start, stop, begin, end in zip(first.tolist(), ends, low.tolist(), high.tolist(), strict=False):
            part = rows[start:stop]
            at = np.searchsorted(known["time_ns"][begin:end], where["time_ns"][part], "right") - 1
            where["tid"][part[at >= 0]] = running[begin:end][at[at >= 0]]
    for bit, name in ((Present.CONTEXT_EL2, "context_el2"), (Present.CONTEXT_EL1, "context_el1")):
        has = (records["present"] & int(bit)) != 0
        where["tid"][has] = records[name][has].astype(np.int32)


def _load(path: Path) -> bytes:
    """Return the content of a file or pipe; a device would never end."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CaptureError(
                f"'{path}' is a directory. perf.data directories ('perf record --threads') are not read; "
                "record without --threads."
            )
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise CaptureError(f"'{path}' is neither a file nor a pipe. Give a perf.data file.")
        return path.read_bytes()
    except OSError as error:
        raise CaptureError(f"'{path}' cannot be read: {error.strerror}. Give a perf.data file.") from error
