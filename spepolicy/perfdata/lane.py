"""A lane of the machine as the perf.data file that perf in its guest would have written.

`lane_file` makes it; the two images that its functions' names come from (`program`) must lie beside it. What the
guest's kernel and perf would not know is there as well, since it is what the file is looked at for: one
PERF_RECORD_AUXTRACE_ERROR for each blackout window of the judge, with its cause and length. `perf script` prints them
among the samples, in order of time:

    instruction trace error type 1 time 0.000253080 cpu 0 pid 1000 tid 1000 ip 0 code 5: stage2-fault 12.3us (host)

Time is that of the guest's generic counter, which goes on while the guest does not run. Without context packets
(PMSCR_EL1.CX) perf knows the task from the context switches that the guest's kernel reports, and says so. Two
assumptions are not the machine's: data sources are numbered as on Neoverse N1, and the part of the latency before issue
is drawn (`spepolicy.machine.trace.latencies`).
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha1
from pathlib import Path
from re import sub
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spepolicy.drivers.result import LaneLog
from spepolicy.machine.scenario import OpType, Scenario, SessionMode
from spepolicy.machine.state import LostCause
from spepolicy.machine.trace import LogKind, samples
from spepolicy.perfdata.aux_area import AuxArea, aux_area, tick_ps
from spepolicy.perfdata.clock import conversion, ticks_to_ns
from spepolicy.perfdata.layout import (
    AttrFlag,
    Aux,
    AuxtraceError,
    Comm,
    Feature,
    ItraceStart,
    Misc,
    Mmap2,
    SampleId,
    SpeConfig,
    Switch,
    Type,
)
from spepolicy.perfdata.program import KERNEL_BASE, KERNEL_FILE, PROGRAM_FILE, USER_BASE, images
from spepolicy.perfdata.writer import Writer, dummy_event, spe_event

__all__ = ["LaneFile", "first_thread", "lane_file"]

NEOVERSE_N1 = "0x00000000413fd0c1"  # MIDR_EL1 r3p1; with it perf 6.1 names data sources (perfdata.md 3)
PROGRAM, OTHER = "program", "other"  # comm of the profiled task and of the other one
_KERNEL_BYTES = 0x10000
_SPE_IDS, _DUMMY_IDS = 100, 200  # and the number of the vCPU
_ITRACE = 1  # PERF_AUXTRACE_ERROR_ITRACE
_PROT_READ_WRITE, _PROT_READ_EXECUTE, _MAP_PRIVATE = 3, 5, 2
_PIECE_BYTES = 1 << 26  # an AUXTRACE record's data, a limit only on what is held twice


class LaneFile(NamedTuple):
    """A perf.data file and what it was made of."""

    content: bytes
    areas: tuple[AuxArea, ...]  # of each vCPU


def first_thread(k: int) -> int:
    """Return the thread id of the profiled task of vCPU *k*; that of the other task is the next."""
    return 1000 + 2 * k


def window_name(cause: LostCause) -> tuple[str, str]:
    """Return what is said of a blackout window before and behind its length: stage2-fault 12.3us (host)."""
    name = cause.name.lower().replace("_", " ")
    stage, _, by = name.partition(" ")
    return ("stage2-fault ", f" ({by})") if stage == "stage2" else (name.replace(" ", "-") + " ", "")


def has_context(scenario: Scenario) -> bool:
    """Whether the guest's kernel has the SPU write CONTEXTIDR_EL1 (PMSCR_EL1.CX)."""
    return bool(getattr(scenario.guest, "context", False))


class _Happening(NamedTuple):
    """Something to be written at a time; what is of equal time is written in this order."""

    ns: int
    order: int
    write: Callable[[], None]


def lane_file(log: LaneLog, folder: Path) -> LaneFile:
    """Return the perf.data of a lane. *folder*: where `PROGRAM_FILE` and `KERNEL_FILE` will lie; perf looks there."""
    scenario = log.result.scenario
    vcpus = scenario.guest.vcpus
    sampled = samples(log.rows, scenario.workload)
    context = has_context(scenario)
    areas = tuple(aux_area(log, sampled, k, first_thread(k) if context else None) for k in range(vcpus))
    made = _Lane(log, areas)
    made.begin(folder.resolve())
    made.body()
    return LaneFile(made.writer.content(), areas)


class _Lane:
    def __init__(self, log: LaneLog, areas: tuple[AuxArea, ...]) -> None:
        self.log, self.areas, self.scenario = log, areas, log.result.scenario
        vcpus = range(self.scenario.guest.vcpus)
        events = [_event(self.scenario, [_SPE_IDS + k for k in vcpus]), dummy_event([_DUMMY_IDS + k for k in vcpus])]
        self.writer = Writer(events, _features(log), cpus=len(vcpus), memory_kib=self.scenario.guest.ram_pages * 4)
        self.tick_ps = tick_ps(self.scenario)
        self.clock = conversion(1_000_000_000_000 // self.tick_ps)

    def ns(self, host_ps: int) -> int:
        """Return perf's time: that of the last tick of the counter."""
        return int(ticks_to_ns(self.clock, np.array([host_ps // self.tick_ps], np.uint64))[0])

    def who(self, k: int, ns: int, ids: int = _DUMMY_IDS) -> SampleId:
        return SampleId(first_thread(k), first_thread(k), ns, k, ids + k)

    def begin(self, folder: Path) -> None:
        """Write what perf synthesizes before it starts: clock, kernel, tasks and what they have mapped."""
        w, parts = self.writer, images(self.scenario.workload)
        w.open(self.clock)
        start = SampleId(0, 0, 0, 0, _DUMMY_IDS)
        # The kernel proper: without it perf warns, and without a build id it takes names from the kernel it runs on.
        other = sha1(parts.kernel.build_id, usedforsecurity=False).digest()
        below = KERNEL_BASE - _KERNEL_BYTES
        kernel = Mmap2(-1, 0, below, _KERNEL_BYTES, below, _identity(other), 0, 0, "[kernel.kallsyms]_text")
        w.add(Type.MMAP2, kernel, start, Misc.KERNEL | Misc.MMAP_BUILD_ID)
        module = kernel._replace(
            start=KERNEL_BASE, length=parts.size, page_offset=0, identity=_identity(parts.kernel.build_id),
            name=str(folder / KERNEL_FILE),
        )  # fmt: skip
        w.add(Type.MMAP2, module, start, Misc.KERNEL | Misc.MMAP_BUILD_ID)
        for k in range(self.scenario.guest.vcpus):
            for n, name in enumerate((PROGRAM, OTHER)):
                pid = first_thread(k) + n
                who = SampleId(pid, pid, 0, k, _DUMMY_IDS + k)
                w.add(Type.COMM, Comm(pid, pid, name if self.scenario.guest.vcpus == 1 else f"{name}-{k}"), who)
                code = Mmap2(pid, pid, USER_BASE, parts.size, 0, _identity(parts.program.build_id), _PROT_READ_EXECUTE,
                             _MAP_PRIVATE, str(folder / PROGRAM_FILE))  # fmt: skip
                w.add(Type.MMAP2, code, who, Misc.USER | Misc.MMAP_BUILD_ID)
            self._data_regions(first_thread(k), SampleId(first_thread(k), first_thread(k), 0, k, _DUMMY_IDS + k))
        w.add(Type.FINISHED_INIT)

    def _data_regions(self, pid: int, who: SampleId) -> None:
        """Write where the program's data lie, if the workload knows, so that perf names them: [heap], [stack]."""
        known = self.scenario.workload.data
        for region in known.regions if known else ():
            name = sub(r" \d+$", "", region.name)  # several of a name are numbered
            name = "//anon" if name == "anon" else name
            mapped = Mmap2(pid, pid, region.begin, region.size, 0, bytes(24), _PROT_READ_WRITE, _MAP_PRIVATE, name)
            self.writer.add(Type.MMAP2, mapped, who, Misc.USER | Misc.MMAP_DATA)

    def body(self) -> None:
        """Write everything that happens, by time."""
        happenings: list[_Happening] = []
        for k, area in enumerate(self.areas):
            happenings += self._handles(k, area.handles)
            happenings += self._reads(k, area)
            happenings += self._switches(k)
        happenings += self._blackouts()
        for happening in sorted(happenings, key=lambda it: it[:2]):
            happening.write()
        self.writer.finish_round()
        self.writer.finish_round()

    def _handles(self, k: int, handles: NDArray[Any]) -> list[_Happening]:
        def happening(host_ps: int, offset: int, size: int, flags: int) -> _Happening:
            ns = self.ns(host_ps)
            who = self.who(k, ns, _SPE_IDS)
            return _Happening(ns, 0, lambda: self.writer.add(Type.AUX, Aux(offset, size, flags), who))

        return [happening(*row) for row in handles.tolist()]

    def _reads(self, k: int, area: AuxArea) -> list[_Happening]:
        def happening(host_ps: int, begin: int, end: int) -> _Happening:
            def write() -> None:
                for at in range(begin, end, _PIECE_BYTES):
                    piece = area.content[at : min(at + _PIECE_BYTES, end)]
                    self.writer.add_aux_data(piece, offset=at, cpu=k)

            return _Happening(self.ns(host_ps), 1, write)

        return [happening(*row) for row in area.reads.tolist()]

    def _switches(self, k: int) -> list[_Happening]:
        """The task that runs, where no context packet tells it: perf takes it from who is switched to."""
        if has_context(self.scenario):
            return []
        rows = self.log.rows[(self.log.rows["vcpu"] == k) & (self.log.rows["kind"] == LogKind.SEGMENT)]
        tasks = (rows["b"] >> np.uint64(16)).astype(np.int64) & 1
        changes = np.flatnonzero(np.diff(tasks, prepend=-1))

        def happening(host_ps: int, task: int) -> _Happening:
            ns = self.ns(max(host_ps, self.tick_ps))  # perf ignores a switch at time 0
            nxt = Switch(first_thread(k) + task, first_thread(k) + task)
            who = self.who(k, ns)
            return _Happening(ns, 0, lambda: self.writer.add(Type.SWITCH_CPU_WIDE, nxt, who, Misc.SWITCH_OUT))

        return [happening(int(rows["host_ps"][n]), int(tasks[n])) for n in changes]

    def _blackouts(self) -> list[_Happening]:
        return [
            self._blackout(
                int(row["vcpu"]), int(row["start_host_ps"]), int(row["length_ps"]), LostCause(int(row["cause"]))
            )
            for row in self.log.result.windows
        ]

    def _blackout(self, k: int, start_host_ps: int, length_ps: int, cause: LostCause) -> _Happening:
        """perf prints an error when it reads it, and samples when something later has been read twice over.

        So a record of the tick after the window's beginning comes first, which makes perf deliver what is older (it
        compares in ticks), and two rounds are finished, which make it take that record.
        """
        ns = self.ns(start_host_ps)
        what, why = window_name(cause)
        tid = first_thread(k)
        message = f"{what}{length_ps / 1e6:.1f}us{why}"
        error = AuxtraceError(_ITRACE, int(cause), k, tid, tid, 2, 0, ns, message, 0, 0)
        who = self.who(k, self.ns(start_host_ps + self.tick_ps), _SPE_IDS)

        def write() -> None:
            self.writer.add(Type.ITRACE_START, ItraceStart(tid, tid), who)
            self.writer.finish_round()
            self.writer.finish_round()
            self.writer.add(Type.AUXTRACE_ERROR, error)

        return _Happening(ns, 2, write)


def _identity(build_id: bytes) -> bytes:
    """Return the build id as MMAP2 holds it."""
    return bytes([len(build_id), 0, 0, 0]) + build_id


def _event(scenario: Scenario, ids: list[int]) -> Any:
    guest = scenario.guest
    config = SpeConfig.TS
    if guest.jitter:
        config |= SpeConfig.JITTER
    for bit, flag in (
        (OpType.BRANCH, SpeConfig.BRANCH),
        (OpType.LOAD, SpeConfig.LOAD),
        (OpType.STORE, SpeConfig.STORE),
    ):
        if guest.type_filter & bit:
            config |= flag
    flags = AttrFlag(0)
    if not guest.profile_user:
        flags |= AttrFlag.EXCLUDE_USER
    if not guest.profile_kernel:
        flags |= AttrFlag.EXCLUDE_KERNEL
    return spe_event(
        guest.period_ops,
        config,
        ids,
        event_filter=guest.event_filter,
        min_latency=guest.min_latency_cycles,
        flags=flags,
    )


def _features(log: LaneLog) -> dict[Feature, str | list[str]]:
    """Return what the header says; Arm's spe-parser needs all of the texts (perfdata.md 6)."""
    from spepolicy.version import program_version

    result, guest = log.result, log.result.scenario.guest
    terms = ["ts_enable=1", f"jitter={int(guest.jitter)}"]
    target = ["-a"] if guest.session is SessionMode.PER_CPU else ["--", PROGRAM]
    return {
        Feature.HOSTNAME: f"{result.policy}-{int(result.replicates[0])}",
        Feature.OSRELEASE: "6.18.0-simulated",
        Feature.VERSION: f"spepolicy {program_version()}",
        Feature.ARCH: "aarch64",
        Feature.CPUDESC: f"simulated, seed {result.scenario.seed}, PMSVer {result.scenario.cpu.spe_version}",
        Feature.CPUID: NEOVERSE_N1,
        Feature.CMDLINE: [
            "perf",
            "record",
            "-e",
            f"arm_spe_0/{','.join(terms)}/",
            "-c",
            str(guest.period_ops),
            *target,
        ],
    }
