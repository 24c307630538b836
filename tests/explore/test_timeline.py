"""Traces on the timeline: each step is there, with what it did, and Perfetto's own parser reads the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spepolicy.explore.acts import event_name
from spepolicy.explore.properties import Kind
from spepolicy.explore.search import Found, Outcome
from spepolicy.explore.timeline import STEP_PS, log_of, write_trace
from spepolicy.lab.timeline import Event, events
from spepolicy.machine.scenario import MigrationKind
from spepolicy.machine.trace import HOST

from .conftest import explored


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return explored("pin_on_fault", 9, host_ops=("numa_scan",), sessions=("el0_el1",))


@pytest.fixture(scope="module")
def found(outcome: Outcome) -> Found:
    """A first fault, which the policy repairs by pinning, and then one that the host has caused."""
    return next(f for f in outcome.found if f.kind is Kind.PINNED_FAULT)


def shown(outcome: Outcome, found: Found) -> list[Event]:
    rows, _ = log_of(outcome.model, found.events)
    return events(rows, outcome.model.scenario.workload)


def step_of(event: Event) -> int:
    return event.ps // STEP_PS


def test_what_a_step_did_is_at_its_place(outcome: Outcome, found: Found) -> None:
    timeline = shown(outcome, found)
    names = [event_name(event) for event in found.events]
    opened, scanned = names.index("open {1,1}") + 1, names.index("host numa_scan buffer 0") + 1
    registers = [e for e in timeline if e.track == "registers" and step_of(e) == opened]
    assert any(e.name.startswith("PMBLIMITR_EL1") for e in registers)
    (op,) = [e for e in timeline if e.track == "host" and e.name == "numa_scan"]
    assert (step_of(op), op.facts["pages"]) == (scanned, 1)
    stops = [e for e in timeline if e.track == "SPU" and e.name.startswith("stop")]
    assert [step_of(e) for e in stops] == [n for n, name in enumerate(names, 1) if name == "write"][-len(stops) :]
    assert stops[-1].name == "stop: stage2_host"
    assert [e for e in timeline if e.track == "blackout" and e.phase == "begin"][-1].name == "stage2_host"
    assert step_of(timeline[-1]) <= len(names)


def test_an_arrow_leads_from_the_host_to_the_fault(outcome: Outcome, found: Found) -> None:
    timeline = shown(outcome, found)
    (notified,) = [e for e in timeline if e.track == "host" and e.name.startswith("notifier")]
    stop = [e for e in timeline if e.track == "SPU" and e.name.startswith("stop")][-1]
    assert set(notified.flows) & set(stop.flows)


def test_a_migration_is_a_track() -> None:
    outcome = explored("map_on_fault", 8, migration=MigrationKind.POSTCOPY, sessions=("el0_el1",), max_switches=0)
    found = next(f for f in outcome.found if f.kind is Kind.ABSENT_PAGE)
    phases = [e.name for e in shown(outcome, found) if e.track == "migration" and e.phase == "begin"]
    assert phases == ["stopped", "arriving"]


def test_perfetto_reads_every_step(outcome: Outcome, found: Found, tmp_path: Path) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace

    path = write_trace(tmp_path / "t.pftrace", outcome.model, found.events, "no_host_blackout, under pin_on_fault")
    trace = Trace()
    trace.ParseFromString(path.read_bytes())
    tracks: dict[int, Any] = {
        p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")
    }
    (steps,) = [uuid for uuid, track in tracks.items() if track.name == "steps"]
    slices = [p.track_event for p in trace.packet if p.HasField("track_event") and p.track_event.track_uuid == steps]
    begins = [event.name for event in slices if event.type == event.TYPE_SLICE_BEGIN]
    assert [int(name.split(".")[0]) for name in begins] == list(range(1, len(found.events) + 1))
    assert len(slices) == 2 * len(begins)
    last = [event for event in slices if event.type == event.TYPE_SLICE_BEGIN][-1]
    assert "breaks no_host_blackout" in {note.name for note in last.debug_annotations}
    assert {e.vcpu for e in shown(outcome, found)} == {HOST, 0}
