"""Results made by hand: small, consistent, with answers that a reader can work out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spepolicy.alias import TABLE_DRAWS, alias_table
from spepolicy.drivers.result import Result
from spepolicy.machine.fields import TRUTH, VCPU, VM, WINDOW
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Guest, OpType, Scenario, Workload
from spepolicy.machine.state import LOST_CAUSES, NEVER, LostCause

MS = 1_000_000_000  # ps
SECOND = 1000 * MS
FUNCTIONS = ("hash", "copy", "idle_loop")


def workload() -> Workload:
    """Two distributions over three functions, one kind of operation each: hash is branches, copy loads, idle_loop
    other.

    Distribution 0 is 1/2 hash, 1/2 copy at 100 ps an operation; distribution 1 is 1/4 copy, 3/4 idle_loop at 200 ps.
    """
    weight = np.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    tables = [alias_table([int(w * TABLE_DRAWS) for w in row]) for row in weight]
    return Workload(
        function_names=FUNCTIONS,
        distribution_names=("work", "wait"),
        op_ps=np.array([100, 200]),
        alias_threshold=np.array([threshold for threshold, _ in tables]),
        alias_outcome=np.array([outcome for _, outcome in tables]),
        weight=weight,
        outcome_function=np.array([0, 1, 2]),
        outcome_type=np.array([OpType.BRANCH, OpType.LOAD, OpType.OTHER]),
        outcome_events=np.array([0b10, 0b110, 0b10]),
        outcome_latency_cycles=np.array([1, 10, 2]),
        outcome_spread_cycles=np.array([0, 20, 0]),
        phase_user=np.array([0]),
        phase_kernel=np.array([1]),
        phase_ps=np.array([100 * MS]),
        syscall_gap_ps=np.array([MS]),
        syscall_ps=np.array([MS // 10]),
    )


def scenario(**guest: Any) -> Scenario:
    """One second of guest time, an interval of 1,000 + 1 operations without jitter."""
    settings: dict[str, Any] = {"period_ops": 999, "jitter": False}
    return Scenario(workload=workload(), duration_ps=SECOND, guest=Guest(**(settings | guest)))


def empty_result(policy: str = "by_hand", replicates: Sequence[int] = (0,), vcpus: int = 1, **guest: Any) -> Result:
    """Lanes in which nothing was wanted and nothing happened for one second."""
    n, work = len(replicates), scenario(vcpus=vcpus, **guest)
    vcpu = np.zeros((n, vcpus), VCPU)
    vcpu["now_ps"] = work.duration_ps
    truth = np.zeros((n, vcpus), TRUTH)
    truth["first_fault_ps"] = NEVER
    return Result(
        policy=policy,
        scenario=work,
        replicates=np.array(replicates, dtype=np.int64),
        vm=np.zeros(n, VM),
        vcpu=vcpu,
        truth=truth,
        lost=np.zeros((n, vcpus, LOST_CAUSES), np.int64),
        blackout_ps=np.zeros((n, vcpus, LOST_CAUSES), np.int64),
        claims=np.zeros((n, 6, 6), np.int64),
        host_ops=np.zeros((n, len(HostOp)), np.int64),
        exposure_ps=np.zeros((n, vcpus, 2), np.int64),
        seen=np.zeros((n, vcpus, 3), np.int64),
        windows=np.zeros(0, [("lane", np.int64), *WINDOW.descr]),
        host_elapsed_ps=np.full(n, work.duration_ps, np.int64),
        finished=np.ones(n, np.bool_),
        samples=0,
        seconds=0.5,
        memory={"page_tables": 0, "other": 0},
    )


def with_windows(result: Result, windows: Sequence[tuple[int, int, int, int, LostCause]]) -> Result:
    """Add blackout windows (lane, vcpu, start_ps, length_ps, cause) in distribution 0, and their sums."""
    rows = np.zeros(len(windows), result.windows.dtype)
    for row, (lane, vcpu, start, length, cause) in zip(rows, windows, strict=True):
        row["lane"], row["vcpu"], row["start_ps"], row["length_ps"], row["cause"] = lane, vcpu, start, length, cause
        row["start_host_ps"], row["host_length_ps"], row["missed_ops"] = start, length, length // 100
        result.blackout_ps[lane, vcpu, cause] += length
        result.truth["missed_ops"][lane, vcpu] += length // 100
        result.truth["wanted_ps"][lane, vcpu] += length
        result.truth["wanted_ops"][lane, vcpu] += length // 100
        result.exposure_ps[lane, vcpu, 0] += length
    return replace(result, windows=np.concatenate([result.windows, rows]))


def profiled(result: Result, lane: int, vcpu: int, active_ps: tuple[int, int], seen: tuple[int, int, int]) -> None:
    """Let a vCPU profile for *active_ps* in distributions 0 and 1, with *seen* records kept by function, none lost."""
    truth = result.truth[lane, vcpu]
    truth["active_ps"] += sum(active_ps)
    truth["wanted_ps"] += sum(active_ps)
    truth["wanted_ops"] += active_ps[0] // 100 + active_ps[1] // 200
    truth["selected"] += sum(seen)
    truth["written"] += sum(seen)
    truth["kept"] += sum(seen)
    result.exposure_ps[lane, vcpu] += active_ps
    result.seen[lane, vcpu] += seen


def eventful_result(
    policy: str = "by_hand", replicates: Sequence[int] = (0, 1, 2, 3), blackout_ms: int = 100
) -> Result:
    """Lane n: 800 ms active, 500 + n records, and *blackout_ms* + n ms of blackout by two stage 2 faults."""
    result = empty_result(policy, replicates)
    windows = []
    for lane in range(len(replicates)):
        profiled(result, lane, 0, (400 * MS, 400 * MS), (200 + lane, 150, 150))
        truth = result.truth[lane, 0]
        truth["selected"] += 2
        truth["stage2_faults"], truth["irqs"] = 2, 2
        truth["first_fault_ps"], truth["first_fault_va"] = 5 * MS, 0xFFFF_8000_0000
        truth["first_fault_syndrome"] = 0x94020007
        result.lost[lane, 0, LostCause.STAGE2_HOST] = 1
        result.lost[lane, 0, LostCause.STAGE2_NOT_PINNED] = 1
        result.claims[lane, 3, 3] = 1
        result.claims[lane, 3, 1] = 1
        windows += [
            (lane, 0, 100 * MS, blackout_ms * MS, LostCause.STAGE2_HOST),
            (lane, 0, 700 * MS, (1 + lane) * MS, LostCause.STAGE2_NOT_PINNED),
        ]
    return with_windows(result, windows)
