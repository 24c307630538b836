"""The timeline: Perfetto reads it, and it shows what the judge counted."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spepolicy.drivers.result import LaneLog
from spepolicy.drivers.simulate import record_lane
from spepolicy.errors import OutputError
from spepolicy.lab.timeline import events, write_timeline
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.state import Hook, LostCause

from ..properties.scenarios import QUIET, US, WORKLOAD, busy_host, guest, policy, scenario

SCANS = scenario(
    kvm=QUIET,
    host=busy_host(HostOp.NUMA_SCAN, interval_ps=150 * US, pages=1024),
    guest=guest(buffer_pages=16, vcpus=2),
)


@pytest.fixture(scope="module")
def lane() -> LaneLog:
    return record_lane(SCANS, policy("eager_pin"), name="eager_pin", replicate=0)


@pytest.fixture(scope="module")
def packets(lane: LaneLog, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What Perfetto's own parser makes of the file."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace

    path = write_timeline(tmp_path_factory.mktemp("t") / "lane.pftrace", lane, WORKLOAD, "eager_pin, lane 0")
    trace = Trace()
    trace.ParseFromString(path.read_bytes())
    return list(trace.packet)


def test_tracks_have_names_parents_and_one_id_each(packets: list[Any]) -> None:
    tracks = [packet.track_descriptor for packet in packets if packet.HasField("track_descriptor")]
    ids = [track.uuid for track in tracks]
    assert len(set(ids)) == len(ids)
    assert all(track.parent_uuid in ids for track in tracks[1:])
    assert tracks[0].process.process_name == "eager_pin, lane 0"
    names = Counter(track.name for track in tracks)
    assert names["vCPU 0"] == names["vCPU 1"] == names["host"] == 1
    assert names["SPU"] == names["executes"] == names["policy"] == 2


def test_every_slice_ends_and_none_overlaps_another_of_its_track(packets: list[Any]) -> None:
    depth: Counter[int] = Counter()
    time = 0
    for packet in packets:
        if not packet.HasField("track_event"):
            continue
        assert packet.timestamp >= time
        time = packet.timestamp
        event = packet.track_event
        depth[event.track_uuid] += (event.type == event.TYPE_SLICE_BEGIN) - (event.type == event.TYPE_SLICE_END)
        assert 0 <= depth[event.track_uuid] <= 1
    assert not any(depth.values())


def test_it_shows_what_the_judge_counted(lane: LaneLog) -> None:
    shown = events(lane.rows, WORKLOAD)
    truth, vm = lane.result.truth[0], lane.result.vm[0]
    assert truth["stage2_faults"].sum() > 5
    stops = [event for event in shown if event.name.startswith("stop: ")]
    for vcpu in (0, 1):
        mine = Counter(event.name for event in stops if event.vcpu == vcpu)
        stage2 = sum(count for name, count in mine.items() if name.startswith("stop: stage2"))
        assert stage2 == truth["stage2_faults"][vcpu]
        assert mine["stop: buffer_full"] == truth["buffer_full"][vcpu]
        windows = lane.result.windows[lane.result.windows["vcpu"] == vcpu]
        begun = Counter(
            event.name for event in shown if event.track == "blackout" and event.phase == "begin" and event.vcpu == vcpu
        )
        assert begun == Counter(LostCause(cause).name.lower() for cause in windows["cause"])
    operations = Counter(event.name for event in shown if event.track == "host" and "notifier" not in event.name)
    assert operations == {"numa_scan": vm["host_events"]}
    assert [event.value for event in shown if event.phase == "counter"][-1] == vm["pinned_pages"] == 0
    peak = max(event.value for event in shown if event.phase == "counter")
    assert peak == vm["pinned_peak_pages"]


def test_arrows_lead_from_the_host_to_the_fault_and_on_to_the_handler(lane: LaneLog) -> None:
    shown = events(lane.rows, WORKLOAD)
    by_flow: dict[int, list[Any]] = {}
    for event in shown:
        for flow in event.flows:
            by_flow.setdefault(flow, []).append(event)
    chains = [[event.name for event in chain] for chain in by_flow.values()]
    host = [chain for chain in chains if chain[0].startswith("notifier: ")]
    faults = [event for event in shown if event.name == "stop: stage2_host"]
    assert len(host) >= len(faults) * 0.9 > 0, "the host did it, and the page says when"
    assert all(chain == ["notifier: numa_scan", "stop: stage2_host"] for chain in host)
    answered = [chain for chain in chains if chain[0] == "stop: stage2_host" and chain[-1].startswith("driver:")]
    assert answered
    for chain in answered:
        assert chain[1:4] == ["PMBIRQ", f"{Hook.STAGE2_FAULT.name.lower()}()", "inject"]


def test_perfetto_answers_queries(lane: LaneLog, tmp_path: Path) -> None:
    """With the trace processor of Perfetto, a program of its own, where that is installed."""
    program = shutil.which("trace_processor_shell") or shutil.which("trace_processor")
    if program is None:
        pytest.skip("Perfetto's trace_processor_shell is not on PATH; the Python package fetches it from the network")
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    path = write_timeline(tmp_path / "lane.pftrace", lane, WORKLOAD, "eager_pin")
    with TraceProcessor(trace=str(path), config=TraceProcessorConfig(bin_path=program)) as processor:
        query = "select count(*) as n from slice where name glob 'stop: stage2*'"
        assert next(iter(processor.query(query))).n == lane.result.truth["stage2_faults"].sum()
        assert next(iter(processor.query("select count(*) as n from flow"))).n > 0


def test_a_folder_that_cannot_be_written_is_named(lane: LaneLog, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no/lane.pftrace' cannot be written"):
        write_timeline(tmp_path / "no" / "lane.pftrace", lane, WORKLOAD, "x")
