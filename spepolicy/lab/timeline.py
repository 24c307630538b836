"""A lane's event log as a timeline in Perfetto's format: https://ui.perfetto.dev opens the file.

A vCPU is a group of tracks: what it executes, its SPU, blackouts, register writes, the AUX ring, KVM and the policy.
The host's operations and migration have tracks of the VM. Arrows (flows) lead from what the host did to the fault that
it caused, and from each buffer management event over KVM's and the policy's answer to the guest's handler.

Time is host time. The writer is Perfetto's own protocol buffers (package `perfetto`), which are loaded here only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBSR_DL, PMBSR_EC_SHIFT, PMBSR_S
from spepolicy.errors import OutputError
from spepolicy.hookspecs import Cause
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.migration import Phase
from spepolicy.machine.scenario import Workload
from spepolicy.machine.state import Hook, LostCause, Segment
from spepolicy.machine.trace import HOST, LogKind, Register

if TYPE_CHECKING:
    from spepolicy.drivers.result import LaneLog

__all__ = ["Event", "events", "write_events", "write_timeline"]

K = LogKind
VM_TRACKS = ("steps", "host", "migration")
VCPU_TRACKS = ("executes", "SPU", "blackout", "registers", "AUX ring", "KVM", "policy")


@dataclass(frozen=True)
class Event:
    """Something on a track: a slice that begins or ends, an instant, or the value of a counter."""

    ps: int
    vcpu: int  # HOST for the VM's own tracks
    track: str
    phase: str  # "begin", "end", "instant" or "counter"
    name: str
    facts: dict[str, str | int]
    flows: tuple[int, ...] = ()
    value: int = 0  # of a counter


def _name(kind: type[IntEnum], value: int) -> str:
    try:
        return kind(value).name.lower()
    except ValueError:
        return f"{kind.__name__} {value}"


def _pmbsr(value: int) -> dict[str, str | int]:
    return {
        "PMBSR_EL1": hex(value),
        "S": int(value & PMBSR_S != 0),
        "DL": int(value & PMBSR_DL != 0),
        "EC": hex(value >> PMBSR_EC_SHIFT & 0x3F),
        "FSC or BSC": hex(value & 0x3F),
    }


class _Flows:
    """Numbers the arrows: one from each stop of an SPU to its handling, one from a host operation to a stop."""

    def __init__(self) -> None:
        self._last = 0
        self._open: dict[int, int] = {}  # vCPU -> flow of the buffer management event that is being handled
        self._removed: dict[int, int] = {}  # guest page -> index of the host's event that removed it
        self.sources: defaultdict[int, list[int]] = defaultdict(list)  # index of an event -> flows that begin there
        self._page: dict[int, int] = {}  # vCPU -> guest page of the fault just logged

    def removed(self, index: int, first: int, pages: int) -> None:
        for page in range(first, first + min(pages, 1 << 16)):
            self._removed[page] = index

    def fault_at(self, vcpu: int, page: int) -> None:
        self._page[vcpu] = page

    def stop(self, vcpu: int) -> tuple[int, ...]:
        """Begin the flow of a stop; with the arrow from what the host did to its page, if it did."""
        self._last += 1
        self._open[vcpu] = self._last
        found = [self._last]
        source = self._removed.get(self._page.pop(vcpu, -1))
        if source is not None:
            self._last += 1
            self.sources[source].append(self._last)
            found.append(self._last)
        return tuple(found)

    def of(self, vcpu: int) -> tuple[int, ...]:
        return (self._open[vcpu],) if vcpu in self._open else ()

    def done(self, vcpu: int) -> tuple[int, ...]:
        flow = self._open.pop(vcpu, None)
        return () if flow is None else (flow,)


class _Translator:
    """Turns rows of the log into events, one method a kind; kinds that it does not know become instants."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.flows = _Flows()
        self.pinned = 0
        self.open: dict[tuple[int, str], int] = {}  # slices that are open, by vCPU and track
        self.events: list[Event] = []

    def add(
        self,
        row: Any,
        track: str,
        name: str,
        facts: dict[str, str | int] | None = None,
        phase: str = "instant",
        flows: tuple[int, ...] = (),
    ) -> None:
        vcpu = int(row["vcpu"])
        if phase == "begin":
            self.open[vcpu, track] = 1
        elif phase == "end" and not self.open.pop((vcpu, track), 0):
            return
        self.events.append(Event(int(row["host_ps"]), vcpu, track, phase, name, facts or {}, flows))

    def slice(self, row: Any, track: str, name: str, facts: dict[str, str | int]) -> None:
        """End the slice that is open on the track, and begin another."""
        self.add(row, track, "", phase="end")
        self.add(row, track, name, facts, "begin")

    def take(self, row: Any) -> None:
        """Add what *row* says."""
        kind = int(row["kind"])
        method = _METHODS.get(kind)
        if method is None:
            track = "host" if row["vcpu"] == HOST else "KVM"
            facts: dict[str, str | int] = {name: int(row[name]) for name in ("detail", "a", "b")}
            self.add(row, track, _name(LogKind, kind), facts)
        else:
            method(self, row, int(row["detail"]), int(row["a"]), int(row["b"]))

    # ---- the SPU ----

    def segment(self, row: Any, detail: int, level: int, b: int) -> None:
        names = self.workload.distribution_names
        distribution = b & 0xFFFF
        what = names[distribution] if distribution < len(names) else str(distribution)
        name = (
            f"EL{level} {what}" if detail in (Segment.USER, Segment.KERNEL) else f"EL{level} {_name(Segment, detail)}"
        )
        self.slice(row, "executes", name, {"segment": _name(Segment, detail), "task": b >> 16})

    def profiling(self, row: Any, detail: int, _a: int, _b: int) -> None:
        if detail:
            self.slice(row, "SPU", "profiling", {})
        else:
            self.add(row, "SPU", "", phase="end")

    def stopped(self, row: Any, detail: int, a: int, b: int) -> None:
        facts = {"cause": _name(LostCause, detail), **_pmbsr(a), "PMBPTR_EL1": hex(b)}
        self.add(row, "SPU", f"stop: {_name(LostCause, detail)}", facts, flows=self.flows.stop(int(row["vcpu"])))

    def lost(self, row: Any, _detail: int, _a: int, b: int) -> None:
        if b:
            self.flows.fault_at(int(row["vcpu"]), b - 1)

    # ---- the guest ----

    def register(self, row: Any, detail: int, a: int, _b: int) -> None:
        name = f"{_name(Register, detail).upper()}_EL1"
        self.add(row, "registers", f"{name} = {a:#x}", {"register": name, "value": hex(a)})

    def aux_begin(self, row: Any, _detail: int, a: int, b: int) -> None:
        self.slice(row, "AUX ring", "handle", {"head": a, "limit": b})

    def aux(self, row: Any, detail: int, a: int, b: int) -> None:
        self.add(row, "AUX ring", "", phase="end")
        self.add(row, "AUX ring", "PERF_RECORD_AUX", {"flags": hex(detail), "head": a, "size": b})

    def ring_full(self, row: Any, _detail: int, _a: int, _b: int) -> None:
        self.add(row, "AUX ring", "no space", {})

    def read(self, row: Any, _detail: int, a: int, b: int) -> None:
        self.add(row, "AUX ring", "perf has read", {"bytes": b - a})

    def handled(self, row: Any, detail: int, a: int, _b: int) -> None:
        names = ("spurious interrupt", "session goes on", "SPE switched off")
        name = names[detail] if detail < len(names) else f"handled {detail}"
        self.add(row, "registers", f"driver: {name}", _pmbsr(a), flows=self.flows.done(int(row["vcpu"])))

    def virq(self, row: Any, _detail: int, _a: int, _b: int) -> None:
        self.add(row, "registers", "takes PMBIRQ", {}, flows=self.flows.of(int(row["vcpu"])))

    # ---- KVM and the policy ----

    def trapped(self, row: Any, detail: int, a: int, b: int) -> None:
        self.add(row, "KVM", "trap", {"exits": detail, "buffer registers": a, "sampling registers": b})

    def exit(self, row: Any, detail: int, a: int, _b: int) -> None:
        begin = int(row["host_ps"])
        vcpu = int(row["vcpu"])
        name = "preempted" if detail else "exit"
        self.events.append(Event(begin, vcpu, "KVM", "begin", name, {"ns": a // 1000}))
        self.events.append(Event(begin + a, vcpu, "KVM", "end", "", {}))

    def interrupt(self, row: Any, detail: int, _a: int, _b: int) -> None:
        self.add(row, "KVM" if detail else "registers", "PMBIRQ", {}, flows=self.flows.of(int(row["vcpu"])))

    def hook(self, row: Any, detail: int, _a: int, _b: int) -> None:
        name = _name(Hook, detail)
        flows = self.flows.of(int(row["vcpu"])) if detail == Hook.STAGE2_FAULT else ()
        self.add(row, "policy", f"{name}()", {}, flows=flows)

    def walked(self, row: Any, detail: int, a: int, _b: int) -> None:
        self.add(row, "policy", "walk_stage1", {"status": hex(detail), "pages": a})

    def pinned_pages(self, row: Any, detail: int, a: int, _b: int) -> None:
        name = ("pin", "pin: over the memlock limit", "pin: no page")[min(detail, 2)]
        self.add(row, "policy", name, {"pages": a})
        if detail == 0:
            self._count(row, a)

    def unpinned(self, row: Any, _detail: int, a: int, _b: int) -> None:
        self.add(row, "policy", "unpin", {"pages": a})
        self._count(row, -a)

    def _count(self, row: Any, pages: int) -> None:
        self.pinned += pages
        self.events.append(Event(int(row["host_ps"]), HOST, "pinned pages", "counter", "", {}, value=self.pinned))

    def mapped(self, row: Any, detail: int, a: int, _b: int) -> None:
        self.add(row, "policy", "map" if detail == 0 else "map: no page", {"pages": a})

    def resumed(self, row: Any, _detail: int, a: int, _b: int) -> None:
        self.add(row, "policy", "resume", {"PMBPTR_EL1": hex(a)}, flows=self.flows.done(int(row["vcpu"])))

    def injected(self, row: Any, _detail: int, a: int, _b: int) -> None:
        self.add(row, "policy", "inject", _pmbsr(a), flows=self.flows.of(int(row["vcpu"])))

    def claimed(self, row: Any, detail: int, a: int, _b: int) -> None:
        self.add(row, "policy", f"claims {_name(Cause, detail)}", {"true cause": _name(Cause, a)})

    # ---- the host ----

    def host_op(self, row: Any, detail: int, a: int, b: int) -> None:
        self.add(row, "host", _name(HostOp, detail), {"first page": a, "pages": b - a})

    def unmapped(self, row: Any, detail: int, a: int, b: int) -> None:
        first, pages = a & 0xFFFF_FFFF, a >> 32
        self.add(row, "host", f"notifier: {_name(HostOp, detail)}", {"first page": first, "pages": pages, "leaves": b})
        self.flows.removed(len(self.events) - 1, first, pages)

    def migrated(self, row: Any, detail: int, a: int, b: int) -> None:
        self.slice(row, "migration", _name(Phase, detail), {"pages being sent": a, "round": b})

    # ---- blackouts ----

    def black(self, row: Any, detail: int, _a: int, _b: int) -> None:
        self.slice(row, "blackout", _name(LostCause, detail), {})

    def light(self, row: Any, detail: int, a: int, b: int) -> None:
        self.add(row, "blackout", "", phase="end")
        self.add(row, "blackout", "over", {"cause": _name(LostCause, detail), "wanted ns": a // 1000, "missed ops": b})

    def ignored(self, _row: Any, _detail: int, _a: int, _b: int) -> None:
        """One of thousands of samples: the counters of the result have them."""


_T = _Translator
_METHODS: dict[int, Callable[[Any, Any, int, int, int], None]] = {
    K.SELECTED: _T.ignored, K.COLLIDED: _T.ignored, K.FILTERED: _T.ignored, K.WRITTEN: _T.ignored, K.LOST: _T.lost,
    K.STOPPED: _T.stopped, K.PROFILING: _T.profiling, K.SEGMENT: _T.segment, K.REGISTER: _T.register,
    K.AUX_BEGIN: _T.aux_begin, K.AUX: _T.aux, K.RING_FULL: _T.ring_full, K.READ: _T.read, K.HANDLED: _T.handled,
    K.TRAPPED: _T.trapped, K.EXIT: _T.exit, K.INTERRUPT: _T.interrupt, K.INJECTED: _T.injected, K.VIRQ: _T.virq,
    K.HOOK: _T.hook, K.WALKED: _T.walked, K.PINNED: _T.pinned_pages, K.UNPINNED: _T.unpinned, K.MAPPED: _T.mapped,
    K.RESUMED: _T.resumed, K.CLAIMED: _T.claimed, K.HOST_OP: _T.host_op, K.UNMAPPED: _T.unmapped,
    K.MIGRATED: _T.migrated, K.BLACK: _T.black, K.LIGHT: _T.light,
}  # fmt: skip


def events(rows: NDArray[np.void], workload: Workload) -> list[Event]:
    """Return what the timeline of the event log *rows* (spepolicy.machine.trace.LOG[n]) shows, in order of time; slices
    of a track do not overlap.
    """
    translator = _Translator(workload)
    for row in rows:
        translator.take(row)
    found = translator.events
    for index, flows in translator.flows.sources.items():
        event = found[index]
        found[index] = Event(event.ps, event.vcpu, event.track, event.phase, event.name, event.facts, tuple(flows))
    end = int(rows["host_ps"].max()) if len(rows) else 0
    found += [Event(end, vcpu, track, "end", "", {}) for vcpu, track in translator.open]
    order = np.argsort([event.ps for event in found], kind="stable")
    return [found[n] for n in order]


def write_timeline(path: Path, log: LaneLog, workload: Workload, title: str) -> Path:
    """Write the timeline of *log* to *path* and return it. *title* names the VM in the UI.

    Raises OutputError if the file cannot be written.
    """
    return write_events(path, events(log.rows, workload), title)


def write_events(path: Path, found: list[Event], title: str) -> Path:
    """Write *found*, in order of time, as `write_timeline` does.

    Raises OutputError if the file cannot be written.
    """
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder

    builder = TraceProtoBuilder()
    tracks = _describe(builder, found, title)
    for event in found:
        _emit(builder, tracks[event.vcpu, event.track], event)
    try:
        path.write_bytes(builder.serialize())
    except OSError as error:
        raise OutputError(
            f"the timeline '{path}' cannot be written: {error.strerror or error}. Remedy: set output.dir=FOLDER."
        ) from error
    return path


def _order(found: list[Event]) -> Iterator[tuple[int, str]]:
    """Return vCPU and track of all tracks that have events, in the order in which they are shown."""
    used = {(event.vcpu, event.track) for event in found}
    vcpus = [HOST, *sorted({vcpu for vcpu, _ in used if vcpu != HOST})]
    for vcpu in vcpus:
        known = ("pinned pages", *VM_TRACKS) if vcpu == HOST else VCPU_TRACKS
        rest = sorted(track for owner, track in used if owner == vcpu and track not in known)
        yield from ((vcpu, track) for track in (*known, *rest) if (vcpu, track) in used)


def _describe(builder: Any, found: list[Event], title: str) -> dict[tuple[int, str], int]:
    """Name all tracks; return their ids."""
    root = builder.add_packet().track_descriptor
    root.uuid, root.process.pid, root.process.process_name = 1, 1, title
    root.child_ordering = root.EXPLICIT
    tracks: dict[tuple[int, str], int] = {}
    groups: dict[int, int] = {HOST: 1}
    next_id = 2
    for rank, (vcpu, track) in enumerate(_order(found)):
        if vcpu not in groups:
            group = builder.add_packet().track_descriptor
            group.uuid, group.parent_uuid, group.name, group.sibling_order_rank = next_id, 1, f"vCPU {vcpu}", rank
            group.child_ordering = group.EXPLICIT
            groups[vcpu] = next_id
            next_id += 1
        descriptor = builder.add_packet().track_descriptor
        descriptor.uuid, descriptor.parent_uuid, descriptor.name = next_id, groups[vcpu], track
        descriptor.sibling_order_rank = rank
        if track == "pinned pages":
            descriptor.counter.unit_name = "pages"
        tracks[vcpu, track] = next_id
        next_id += 1
    return tracks


def _emit(builder: Any, track: int, event: Event) -> None:
    packet = builder.add_packet()
    packet.timestamp = event.ps // 1000
    packet.trusted_packet_sequence_id = 1
    out = packet.track_event
    out.track_uuid = track
    out.type = {
        "begin": out.TYPE_SLICE_BEGIN,
        "end": out.TYPE_SLICE_END,
        "instant": out.TYPE_INSTANT,
        "counter": out.TYPE_COUNTER,
    }[event.phase]
    if event.phase == "counter":
        out.counter_value = event.value
        return
    if event.phase == "end":
        return
    out.name = event.name
    out.flow_ids.extend(event.flows)
    for name, value in event.facts.items():
        note = out.debug_annotations.add()
        note.name = name
        if isinstance(value, int):
            note.int_value = value
        else:
            note.string_value = value
