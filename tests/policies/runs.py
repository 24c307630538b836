"""Scenarios in which the only faults are those that a policy lets happen, and running a shipped policy in one."""

from __future__ import annotations

from typing import Any

from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu, Host, HostKind, Scenario

from ..properties.scenarios import MS, QUIET, US, guest, policy, scenario

__all__ = ["FGT", "LANES", "MS", "QUIET", "US", "every", "fresh", "quiet", "run"]

LANES = 6
FGT = Cpu(fine_grained_traps=True)

# A guest whose AUX pages stage 2 does not map, and whose perf reads at once: the only faults are those of the policy.
fresh = guest(
    buffer_mapped=False, buffer_pages=16, task_on_ps=100 * MS, task_off_ps=0, reader_latency_ps=US,
    reader_bytes_per_us=10**6,
)  # fmt: skip


def every(op: HostOp, interval_ps: int = 100 * US, pages: int = 1024) -> Host:
    """A host that does one thing to *pages* of memory now and then."""
    return Host(kind=HostKind.RANDOM, random_ops=((int(op), interval_ps, pages),))


def quiet(**changes: Any) -> Scenario:
    """No exits, no preemption, no limit, and a silent host, but for *changes*."""
    return scenario(**({"kvm": QUIET, "guest": fresh, "duration_ps": 2 * MS} | changes))


def run(name: str, where: Scenario, **fields: Any) -> Result:
    """Run LANES lanes of the shipped policy *name*."""
    return simulate(where, policy(name, **fields), name=name, replicates=range(LANES), threads=1)
