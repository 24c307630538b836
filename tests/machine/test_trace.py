"""The event log: it changes nothing, holds everything, and its counts are the lane's counters."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spepolicy.drivers.result import LaneLog
from spepolicy.drivers.simulate import record_lane, simulate
from spepolicy.errors import ConfigurationError
from spepolicy.machine.scenario import OpType, Scenario
from spepolicy.machine.state import LOST_CAUSES
from spepolicy.machine.trace import FUNCTION_BYTES, HOST, LOG, LogKind, samples

from ..properties.scenarios import ARRAYS, MS, busy_host, guest, policy, random_scenario, scenario

# The log's own bookkeeping, which nothing in the machine reads.
OWN = {"log_count", "flight_counter", "logged_segment", "logged_profiling"}

DRAWN = [random_scenario(random.Random(seed)) for seed in range(100, 108)]


def _record(drawn: tuple[str, dict[str, Any], Scenario], capacity: int = 1 << 16) -> LaneLog:
    name, fields, lane = drawn
    return record_lane(lane, policy(name, **fields), name=name, replicate=1, capacity=capacity)


@pytest.fixture(scope="module", params=range(len(DRAWN)))
def lane(request: pytest.FixtureRequest) -> LaneLog:
    return _record(DRAWN[request.param])


def _count(log: LaneLog, kind: LogKind) -> int:
    return int((log.rows["kind"] == kind).sum())


def _sum(log: LaneLog, kind: LogKind, field: str) -> int:
    return int(log.rows[field][log.rows["kind"] == kind].sum())


def _columns(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if array.dtype.names is None:
        return {"": array}
    return {name: array[name] for name in array.dtype.names if name not in OWN}


@pytest.mark.parametrize("n", range(len(DRAWN)))
def test_a_log_changes_nothing(n: int) -> None:
    """The lane of a batch of three, and the same lane alone with its log on."""
    name, fields, drawn = DRAWN[n]
    batch = simulate(drawn, policy(name, **fields), name=name, replicates=range(3), threads=1)
    logged = _record(DRAWN[n]).result
    for array in ARRAYS:
        whole, alone = getattr(batch, array), getattr(logged, array)
        chosen = whole[whole["lane"] == 1] if array == "windows" else whole[1:2]
        for field, column in _columns(chosen).items():
            if field != "lane":
                assert np.array_equal(column, _columns(alone)[field]), (array, field)


def test_a_log_that_overflows_is_recorded_again_with_room_for_all() -> None:
    small, large = (_record(DRAWN[0], capacity) for capacity in (1, 1 << 20))
    assert len(small.rows) == small.result.vm["log_count"][0] > 100
    assert small.rows.tobytes() == large.rows.tobytes()
    with pytest.raises(ConfigurationError, match="at least one row"):
        _record(DRAWN[0], 0)


def test_counts_of_the_log_are_the_counters_of_the_lane(lane: LaneLog) -> None:
    truth = lane.result.truth[0]
    total = {name: int(truth[name].sum()) for name in truth.dtype.names or ()}
    rows = lane.rows
    assert _count(lane, LogKind.SELECTED) + _count(lane, LogKind.COLLIDED) == total["selected"]
    assert _count(lane, LogKind.COLLIDED) == total["collided"]
    assert _count(lane, LogKind.FILTERED) == total["filtered"]
    assert _count(lane, LogKind.WRITTEN) == total["written"]
    lost = rows["detail"][rows["kind"] == LogKind.LOST]
    assert np.array_equal(np.bincount(lost, minlength=LOST_CAUSES), lane.result.lost[0].sum(axis=0))
    settled = rows[rows["kind"] == LogKind.SETTLED]
    assert settled["a"][settled["detail"] == 0].sum() == total["kept"]
    assert settled["a"][settled["detail"] == 1].sum() == total["discarded"]
    stopped = _count(lane, LogKind.STOPPED)
    assert stopped == total["buffer_full"] + total["stage1_faults"] + total["stage2_faults"]
    assert _count(lane, LogKind.AUX_BEGIN) == total["sessions"]
    assert _count(lane, LogKind.RING_FULL) == total["ring_full"]
    assert _sum(lane, LogKind.TRAPPED, "detail") == total["traps"]
    assert _sum(lane, LogKind.EXIT, "detail") == total["preemptions"]
    assert _count(lane, LogKind.EXIT) == total["exits"] + total["preemptions"]
    assert _count(lane, LogKind.INTERRUPT) == total["irqs"]
    handled = np.bincount(rows["detail"][rows["kind"] == LogKind.HANDLED], minlength=3)
    assert handled[0] == total["spurious"]
    assert handled[2] >= total["fatal"]
    vm = lane.result.vm[0]
    assert _count(lane, LogKind.HOST_OP) == vm["host_events"]
    assert _sum(lane, LogKind.UNMAPPED, "b") == vm["stage2_unmapped"]
    assert _count(lane, LogKind.CLAIMED) == lane.result.claims.sum()


def test_blackouts_of_the_log_are_the_windows(lane: LaneLog) -> None:
    windows, rows = lane.result.windows, lane.rows
    for k in range(lane.result.truth.shape[1]):
        of_vcpu = rows[rows["vcpu"] == k]
        begin, end = (of_vcpu[of_vcpu["kind"] == kind] for kind in (LogKind.BLACK, LogKind.LIGHT))
        expected = windows[windows["vcpu"] == k]
        assert begin["guest_ps"].tolist() == expected["start_ps"].tolist()
        assert begin["host_ps"].tolist() == expected["start_host_ps"].tolist()
        assert begin["detail"].tolist() == end["detail"].tolist() == expected["cause"].tolist()
        assert end["a"].tolist() == expected["length_ps"].tolist()
        assert end["b"].tolist() == expected["missed_ops"].tolist()
        assert (end["host_ps"] - begin["host_ps"]).tolist() == expected["host_length_ps"].tolist()


def test_rows_are_in_order_and_of_known_kinds(lane: LaneLog) -> None:
    rows = lane.rows
    assert rows.dtype == LOG
    assert (np.diff(rows["host_ps"]) >= 0).all()
    assert set(rows["kind"].tolist()) <= {int(kind) for kind in LogKind}
    vcpus = lane.result.truth.shape[1]
    assert set(rows["vcpu"].tolist()) <= {*range(vcpus), HOST}
    for k in range(vcpus):
        assert (np.diff(rows["guest_ps"][rows["vcpu"] == k]) >= 0).all()
    assert (rows["guest_ps"][rows["vcpu"] == HOST] == -1).all()


def test_samples_join_each_selection_with_its_end(lane: LaneLog) -> None:
    workload = lane.result.scenario.workload
    joined = samples(lane.rows, workload)
    truth = lane.result.truth[0]
    assert len(joined) == truth["selected"].sum() - truth["collided"].sum()
    assert (joined["fate"] == 0).sum() == truth["in_flight"].sum()
    kept = joined[joined["kept"]]
    by_function = np.bincount(kept["function"], minlength=lane.result.seen.shape[2])
    assert by_function.tolist() == lane.result.seen[0].sum(axis=0).tolist()
    done = joined[joined["fate"] != 0]
    assert (done["done_ps"] >= done["guest_ps"]).all()


def test_latencies_and_addresses_fit_the_operation(lane: LaneLog) -> None:
    cpu = lane.result.scenario.cpu
    joined = samples(lane.rows, lane.result.scenario.workload)
    written = joined[joined["fate"] == LogKind.WRITTEN]
    top = (1 << cpu.counter_bits) - 1
    assert (written["total"] <= top).all()
    free = written[written["total"] < top]  # where nothing saturates, the parts do not exceed the whole
    assert (free["issue"] + free["translation"] <= free["total"]).all()
    memory = written["type"] & int(OpType.LOAD | OpType.STORE) != 0
    assert (written["translation"][memory] >= 1).all()
    assert (written["translation"][~memory] == 0).all()
    kernel = joined["address"] >> np.uint64(63) == 1
    data = joined["type"] & int(OpType.LOAD | OpType.STORE) != 0
    assert np.array_equal(kernel[data], joined["level"][data] == 1)
    assert (joined["offset"] < FUNCTION_BYTES).all()
    assert (joined["offset"] % 4 == 0).all()
    # an instruction has one type, whenever it is sampled
    types: dict[tuple[int, int], set[int]] = {}
    for row in joined:
        types.setdefault((int(row["function"]), int(row["offset"])), set()).add(int(row["type"]))
    assert all(len(found) == 1 for found in types.values())


def test_records_lie_in_the_buffer_as_pmbptr_moved() -> None:
    """Records of one handle follow each other; each starts where the one before ended."""
    log = record_lane(
        scenario(host=busy_host(), guest=guest(vcpus=1), duration_ps=3 * MS), policy("map_on_fault"),
        name="map_on_fault", replicate=0,
    )  # fmt: skip
    expected = -1
    for row in log.rows[log.rows["vcpu"] == 0]:
        if row["kind"] == LogKind.AUX_BEGIN:
            expected = -1
        if row["kind"] == LogKind.WRITTEN:
            assert expected in (-1, row["a"])
            expected = row["a"] + row["detail"]
    assert expected != -1
