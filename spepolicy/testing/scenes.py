"""Small scenarios in which everything happens often: short sessions, small rings, busy hosts, odd record sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from spepolicy.alias import TABLE_DRAWS, alias_table
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu, Guest, Host, HostKind, Kvm, Scenario, Workload

__all__ = ["MS", "QUIET", "SCENES", "US", "WORKLOAD", "busy_host", "guest", "kvm", "scenario", "tiny_workload"]

US = 1_000_000  # ps
MS = 1000 * US

DISTURBING = tuple(op for op in HostOp if HostOp.CPU_TOUCH < op <= HostOp.SOFT_DIRTY)  # what recordings hold
OPERATIONS = tuple(op for op in HostOp if op > HostOp.CPU_TOUCH)

# (function, type, events, shortest latency, spread in cycles); the last one lasts longer than a short interval.
_OUTCOMES = (
    (0, 1, 0b10, 1, 0), (0, 2, 0b110, 4, 0), (1, 2, 0b1110, 40, 200), (1, 4, 0b110, 2, 5),
    (2, 0, 0b10, 1, 0), (2, 1, 0b1000_0010, 12, 0), (3, 6, 0b110, 30, 50), (3, 0, 0b10, 3000, 4000),
)  # fmt: skip
_SHARES = (
    (0.3, 0.3, 0.1, 0.1, 0.1, 0.1, 0, 0), (0.1, 0.1, 0.3, 0.2, 0.1, 0.1, 0.05, 0.05),
    (0.2, 0.2, 0.1, 0.1, 0.2, 0.1, 0.1, 0), (0.5, 0.5, 0, 0, 0, 0, 0, 0),
    (0, 0, 0.5, 0.5, 0, 0, 0, 0), (0, 0, 0, 0, 0.5, 0.2, 0.3, 0),
)  # fmt: skip


def tiny_workload() -> Workload:
    """Two phases, system calls, another task, and the driver, over four functions."""
    tables = []
    weight = np.zeros((len(_SHARES), 4))
    for d, shares in enumerate(_SHARES):
        counts = [int(share * TABLE_DRAWS) for share in shares]
        counts[shares.index(max(shares))] += TABLE_DRAWS - sum(counts)
        tables.append(alias_table(counts))
        for outcome, count in zip(_OUTCOMES, counts, strict=True):
            weight[d, outcome[0]] += count / TABLE_DRAWS
    columns = np.array(_OUTCOMES, dtype=np.int64).T.copy()
    return Workload(
        function_names=("a", "b", "c", "d"),
        distribution_names=("user0", "user1", "kernel", "other user", "other kernel", "driver"),
        op_ps=np.array([300, 900, 400, 350, 500, 700]),
        alias_threshold=np.stack([table[0] for table in tables]),
        alias_outcome=np.stack([table[1] for table in tables]),
        weight=weight,
        outcome_function=columns[0],
        outcome_type=columns[1],
        outcome_events=columns[2],
        outcome_latency_cycles=columns[3],
        outcome_spread_cycles=columns[4],
        phase_user=np.array([0, 1]),
        phase_kernel=np.array([2, 2]),
        phase_ps=np.array([500 * US, 300 * US]),
        syscall_gap_ps=np.array([30 * US, 10 * US]),
        syscall_ps=np.array([5 * US, 3 * US]),
        other_user=3,
        other_kernel=4,
        driver=5,
    )


WORKLOAD = tiny_workload()


def guest(**changes: Any) -> Guest:
    values: dict[str, Any] = {
        "ram_pages": 1024, "buffer_pages": 4, "period_ops": 512, "task_on_ps": 300 * US, "task_off_ps": 60 * US,
        "reader_latency_ps": 100 * US,
    }  # fmt: skip
    return Guest(**(values | changes))


def kvm(**changes: Any) -> Kvm:
    values: dict[str, Any] = {
        "exit_interval_ps": 40 * US, "preempt_interval_ps": 300 * US, "preempt_ps": 50 * US, "memlock_pages": 64,
    }  # fmt: skip
    return Kvm(**(values | changes))


QUIET = Kvm(exit_interval_ps=0, preempt_interval_ps=0, memlock_unlimited=True)


def busy_host(*ops: HostOp, interval_ps: int = 20 * US, pages: int = 64, **more: Any) -> Host:
    """One event every *interval_ps* on average, of the operations given (by default those that recordings hold)."""
    chosen = ops or DISTURBING
    rows = tuple((int(op), interval_ps * len(chosen), pages) for op in chosen)
    return Host(kind=HostKind.RANDOM, random_ops=rows, **more)


def scenario(**changes: Any) -> Scenario:
    values: dict[str, Any] = {"workload": WORKLOAD, "duration_ps": 3 * MS, "guest": guest(), "kvm": kvm()}
    return Scenario(**(values | changes))


_ROOMY: dict[str, Any] = {"buffer_mapped": False, "buffer_pages": 16, "task_on_ps": 100 * MS, "task_off_ps": 0,
                          "reader_latency_ps": US, "reader_bytes_per_us": 10**6}  # fmt: skip

SCENES: dict[str, Scenario] = {
    # Nothing disturbs: the only faults are those that the policy lets happen.
    "quiet": scenario(kvm=QUIET, guest=guest(**_ROOMY), duration_ps=2 * MS),
    # Sessions of some hundred microseconds, exits, preemptions, and every operation of the host.
    "busy": scenario(host=busy_host()),
    "two vCPUs": scenario(host=busy_host(), guest=guest(vcpus=2)),
    # Scans take the whole of memory away while sessions run.
    "scans": scenario(
        kvm=QUIET, guest=guest(**_ROOMY), host=busy_host(HostOp.NUMA_SCAN, interval_ps=150 * US, pages=1024)
    ),
    # Records cross into pages, so that a fault cuts them: PMBSR_EL1.DL.
    "cut records": scenario(
        kvm=QUIET,
        cpu=Cpu(max_record_bytes=64, align_bytes=4),
        guest=guest(**(_ROOMY | {"ram_pages": 64})),
        host=busy_host(HostOp.NUMA_SCAN, interval_ps=10 * US, pages=1),
    ),
    # {E0SPE, E1SPE} = {1, 0}: profiling becomes enabled by an ERET.
    "EL0 only": scenario(kvm=QUIET, guest=guest(**(_ROOMY | {"profile_kernel": False})), duration_ps=2 * MS),
    # Room to pin less than two buffers.
    "tight memlock": scenario(kvm=kvm(memlock_pages=6), host=busy_host()),
    # perf closes its sessions and opens others, whose AUX pages are new.
    "new buffers": scenario(guest=guest(renew_ps=300 * US), kvm=kvm(memlock_unlimited=True)),
}
"""What the checks run a policy in, by name."""
