"""Small scenarios in which everything happens often: short sessions, small rings, busy hosts, odd record sizes."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.alias import TABLE_DRAWS, alias_table
from spepolicy.drivers.simulate import Result
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import (
    Cpu,
    Guest,
    Host,
    HostKind,
    IrqDelivery,
    Kvm,
    Scenario,
    SessionMode,
    Workload,
)

US = 1_000_000  # ps
MS = 1000 * US

POLICIES = ("bare_metal", "pin_vm", "map_on_fault", "eager_pin", "pin_on_fault", "synthetic_fault")
ARRAYS = ("vm", "vcpu", "truth", "lost", "blackout_ps", "claims", "host_ops", "exposure_ps", "seen", "windows")
DISTURBING = tuple(op for op in HostOp if op > HostOp.CPU_TOUCH)

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


def busy_host(*ops: HostOp, interval_ps: int = 20 * US, pages: int = 64) -> Host:
    """One event every *interval_ps* on average, of the operations given (all by default)."""
    chosen = ops or DISTURBING
    return Host(kind=HostKind.RANDOM, random_ops=tuple((int(op), interval_ps * len(chosen), pages) for op in chosen))


def scenario(**changes: Any) -> Scenario:
    values: dict[str, Any] = {"workload": WORKLOAD, "duration_ps": 3 * MS, "guest": guest(), "kvm": kvm()}
    return Scenario(**(values | changes))


def policy(name: str, **fields: Any) -> Any:
    """Return an instance of a shipped policy."""
    module = importlib.import_module(f"spepolicy_plugins.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))(**fields)


def conserved(result: Result) -> NDArray[np.bool_]:
    """bool[N, V]: every selected sample ended in exactly one way."""
    t = result.truth
    ends = t["collided"] + t["filtered"] + t["kept"] + t["discarded"] + t["in_flight"] + result.lost.sum(axis=2)
    return np.asarray(t["selected"] == ends)


def random_scenario(rng: random.Random) -> tuple[str, dict[str, Any], Scenario]:
    """Draw a policy with its fields and a scenario."""
    largest = rng.choice([64, 128, 256])
    cpu = Cpu(
        max_record_bytes=largest,
        align_bytes=rng.choice([largest, 1, 4, 16, 64]),
        hardware_access_flag=rng.random() < 0.5,
        data_loss_at_boundary=rng.random() < 0.3,
        tlb_entries=rng.choice([1, 2, 16]),
        irq_latency_ps=rng.choice([0, US, 5 * US]),
    )
    user = rng.random() < 0.8
    the_guest = guest(
        vcpus=rng.choice([1, 1, 2]), buffer_pages=rng.choice([2, 4, 16]), buffer_mapped=rng.random() < 0.7,
        session=rng.choice(list(SessionMode)), profile_user=user, profile_kernel=not user or rng.random() < 0.8,
        period_ops=rng.choice([256, 512, 1024]), jitter=rng.random() < 0.5, type_filter=rng.choice([0, 0, 1, 6]),
        event_filter=rng.choice([0, 0, 4]), min_latency_cycles=rng.choice([0, 0, 20]),
        renew_ps=rng.choice([0, 0, 400 * US]), task_off_ps=rng.choice([0, 60 * US]),
        reader_latency_ps=rng.choice([10 * US, 200 * US]),
    )  # fmt: skip
    the_kvm = kvm(
        exit_interval_ps=rng.choice([0, 40 * US]), preempt_interval_ps=rng.choice([0, 300 * US]),
        memlock_pages=rng.choice([3, 64, 2048]), irq_delivery=rng.choice(list(IrqDelivery)),
    )  # fmt: skip
    host = rng.choice([Host(), busy_host(), busy_host(HostOp.MOVE), busy_host(HostOp.KSM, HostOp.FORK, HostOp.RECLAIM)])
    name = rng.choice(POLICIES)
    fields: dict[str, Any] = {}
    if name in ("eager_pin", "pin_on_fault", "synthetic_fault"):
        fields["pin_stage1_tables"] = rng.random() < 0.5
    if name == "eager_pin":
        fields |= {"keep_mapped": rng.random() < 0.5, "el0_only": rng.choice(["error", "first_fault"])}
    return (
        name,
        fields,
        scenario(duration_ps=MS, cpu=cpu, guest=the_guest, kvm=the_kvm, host=host, seed=rng.randrange(1000)),
    )
