"""The perf.data of a lane, read by our own reader: it holds exactly what the machine did and the judge counted."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spepolicy.drivers.result import LaneLog
from spepolicy.drivers.simulate import record_lane
from spepolicy.machine.scenario import GuestDriver, OpType
from spepolicy.machine.state import LostCause
from spepolicy.machine.trace import LogKind, samples
from spepolicy.perfdata.aux_area import tick_ps
from spepolicy.perfdata.capture import Capture, parse
from spepolicy.perfdata.lane import first_thread, lane_file, window_name
from spepolicy.perfdata.layout import AuxFlag
from spepolicy.perfdata.program import KERNEL_BASE, USER_BASE
from spepolicy.spe.operations import is_atomic, is_branch, is_load, is_store
from tests.perfdata.lanes import CUT, LANES, lane
from tests.properties.scenarios import policy, random_scenario

NOWHERE = Path("/nowhere")


def capture_of(log: LaneLog) -> Capture:
    return parse(lane_file(log, NOWHERE).content, "lane")


def check(log: LaneLog, capture: Capture) -> None:
    """Compare a capture with the log and with the judge's books."""
    result, workload = log.result, log.result.scenario.workload
    truth = result.truth[0]
    if truth["resumed_cut"].any():
        # Halves of records in the middle of the stream, which nothing announces: each may spoil the record behind it.
        assert abs(len(capture.records) - int(truth["written"].sum())) <= int(truth["resumed_cut"].sum())
        check_losses(log, capture)
        return
    assert capture.complete, capture.report()
    for k in range(result.scenario.guest.vcpus):
        mine = capture.where["cpu"] == k
        records = capture.records[mine]
        assert len(records) == truth["written"][k]
        written = samples(log.rows, workload)
        written = written[(written["vcpu"] == k) & (written["fate"] == LogKind.WRITTEN)]
        function = (
            records["pc"] - np.where(records["pc_el"] == 0, USER_BASE, KERNEL_BASE).astype(np.uint64)
        ) >> np.uint64(10)
        assert np.array_equal(function.astype(int) - 4, written["function"])
        assert np.array_equal(records["pc"].astype(int) & 1023, written["offset"])
        assert np.array_equal(records["pc_el"], written["level"])
        assert np.array_equal(records["events"], written["events"])
        for latency in ("total", "issue"):
            assert np.array_equal(records[f"{latency}_latency"], written[latency])
        memory = written["type"] & (OpType.LOAD | OpType.STORE) != 0
        assert np.array_equal(records["va"], np.where(memory, written["address"], 0))
        assert np.array_equal(is_branch(records), written["type"] & OpType.BRANCH != 0)
        assert np.array_equal(is_load(records) | is_atomic(records), written["type"] & OpType.LOAD != 0)
        assert np.array_equal(is_store(records) | is_atomic(records), written["type"] & OpType.STORE != 0)
        # Time: no later than the operation began, by less than a tick.
        late = written["host_ps"] - capture.where["time_ns"][mine] * 1000
        assert ((late >= 0) & (late < tick_ps(result.scenario))).all()
        expected = np.where(written["task"] == 0, first_thread(k), first_thread(k) + 1)
        wrong = int((capture.where["tid"][mine] != expected).sum())
        assert wrong <= np.diff(written["task"]).astype(bool).sum() + 1  # a switch and a sample may share a tick
    check_losses(log, capture)


def check_losses(log: LaneLog, capture: Capture) -> None:
    """AUX records and instruction trace errors are those of the driver and the judge."""
    closed = log.rows[log.rows["kind"] == LogKind.AUX]
    closed = closed[(closed["b"] > 0) | (closed["detail"] != 0)]
    still_open = int(log.result.vcpu[0]["handle_open"].sum())
    assert len(closed) <= len(capture.aux) <= len(closed) + still_open
    for flag in (AuxFlag.TRUNCATED, AuxFlag.PARTIAL, AuxFlag.COLLISION):
        told = int((closed["detail"] & int(flag) != 0).sum())
        assert told <= int((capture.aux["flags"] & int(flag) != 0).sum()) <= told + still_open
    windows = log.result.windows
    assert len(capture.errors) == len(windows)
    told = sorted((int(e["cpu"]), int(e["code"]), capture.names[e["message"]]) for e in capture.errors)
    assert told == sorted(
        (int(w["vcpu"]), int(w["cause"]), f"{w['length_ps'] / 1e6:.1f}us".join(window_name(LostCause(w["cause"]))))
        for w in windows
    )


@pytest.mark.parametrize("name", [*LANES, *CUT])
def test_a_lane_reads_back_as_it_was(name: str) -> None:
    check(lane(name), capture_of(lane(name)))


def whole_records(log: LaneLog) -> list[tuple[int, int]]:
    """(ticks, pc) of each record that the SPU wrote whole."""
    return [(int(r["timestamp"]), int(r["pc"])) for area in lane_file(log, NOWHERE).areas for r in area.records]


def test_a_fault_that_is_resumed_leaves_half_a_record_in_the_stream() -> None:
    """That is what PMBSR_EL1.DL is there to tell, and the policy has cleared it."""
    log = lane("resumed")
    cut = int(log.result.truth["resumed_cut"].sum())
    assert cut
    capture = capture_of(log)
    assert capture.problem_count >= cut
    assert capture.skipped_bytes >= cut
    # A half that ends within a packet takes the beginning of the next record for the rest of it.
    whole = set(whole_records(log))
    missing = whole - {(int(r["timestamp"]), int(r["pc"])) for r in capture.records}
    assert len(missing) <= cut
    assert len(capture.records) <= len(whole)


def test_the_lanes_are_worth_testing() -> None:
    captures = {name: capture_of(lane(name)) for name in (*LANES, *CUT)}
    assert all(len(capture.records) > 100 for capture in captures.values())
    flags = {name: int(np.bitwise_or.reduce(capture.aux["flags"])) for name, capture in captures.items()}
    assert flags["slow_reader"] & AuxFlag.TRUNCATED
    assert not flags["slow_reader"] & AuxFlag.PARTIAL
    assert any(flag & AuxFlag.COLLISION for flag in flags.values())
    for name in CUT:
        assert flags[name] & AuxFlag.PARTIAL
        assert captures[name].skipped_bytes  # halves of records
    causes = {int(code) for capture in captures.values() for code in capture.errors["code"]}
    assert len(causes) >= 3


@pytest.mark.parametrize("seed", range(24))
def test_random_lanes_read_back_as_they_were(seed: int) -> None:
    name, fields, what = random_scenario(random.Random(seed))
    what = replace(what, guest=replace(what.guest, driver=GuestDriver.LINUX))  # no other has perf
    log = record_lane(what, policy(name, **fields), name=name, replicate=seed)
    check(log, capture_of(log))


def test_events_of_the_header_say_what_was_recorded() -> None:
    (event,) = capture_of(lane("filtered")).events
    assert event.min_latency == 20
    assert event.config >> 32 & 7 == 0b110  # load_filter, store_filter
    assert event.period == 512
    (event,) = capture_of(lane("el1_only")).events
    assert event.flags >> 4 & 3 == 1  # exclude_user


def test_the_content_does_not_depend_on_when_it_is_written() -> None:
    log = lane("neoverse")
    assert lane_file(log, NOWHERE).content == lane_file(log, NOWHERE).content
