"""Small scenarios in which everything happens often: short sessions, small rings, busy hosts, odd record sizes."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.drivers.result import Result
from spepolicy.machine.guestacts import GuestAct, Moment
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.scenario import (
    Cpu,
    GuestDriver,
    Handling,
    Host,
    IrqDelivery,
    Migration,
    MigrationKind,
    Scenario,
    SessionMode,
)
from spepolicy.testing.scenes import DISTURBING as DISTURBING
from spepolicy.testing.scenes import MS as MS
from spepolicy.testing.scenes import OPERATIONS as OPERATIONS
from spepolicy.testing.scenes import QUIET as QUIET
from spepolicy.testing.scenes import US as US
from spepolicy.testing.scenes import WORKLOAD as WORKLOAD
from spepolicy.testing.scenes import busy_host, guest, kvm, scenario
from spepolicy.testing.scenes import tiny_workload as tiny_workload

POLICIES = ("bare_metal", "pin_vm", "map_on_fault", "eager_pin", "pin_on_fault", "synthetic_fault")
ARRAYS = ("vm", "vcpu", "truth", "lost", "blackout_ps", "claims", "host_ops", "exposure_ps", "seen", "windows")


def policy(name: str, **fields: Any) -> Any:
    """Return an instance of a shipped policy."""
    module = importlib.import_module(f"spepolicy_plugins.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))(**fields)


def conserved(result: Result) -> NDArray[np.bool_]:
    """bool[N, V]: every selected sample ended in exactly one way."""
    t = result.truth
    ends = t["collided"] + t["filtered"] + t["kept"] + t["discarded"] + t["in_flight"] + result.lost.sum(axis=2)
    return np.asarray(t["selected"] == ends)


def random_acts(rng: random.Random) -> tuple[tuple[int, int, int, int, int, int], ...]:
    """Draw what the guest does that it should not: nothing, or some acts at any moment, and what repairs them."""
    if rng.random() < 0.5:
        return ()
    acts = [
        (
            int(act),
            rng.choice([50 * US, 200 * US]),
            0,
            int(rng.choice(list(Moment))),
            rng.randrange(2),
            rng.choice([1, 2]),
        )
        for act in rng.sample(list(GuestAct), rng.choice([1, 3, len(GuestAct)]))
    ]
    return (*acts, (int(GuestAct.RESTORE), 60 * US, 0, int(Moment.ANY), 1, 1))


def random_host(rng: random.Random) -> Host:
    """Draw a host by kernel, backing and operations, of which some take the memory away for good."""
    ops = rng.choice([OPERATIONS, DISTURBING, (HostOp.MOVE, HostOp.THP, HostOp.NUMA_SCAN, HostOp.FORK)])
    kernel = rng.choice(list(Kernel))
    backings = [it for it in Backing if it is not Backing.GUEST_MEMFD or kernel is not Kernel.V6_1]
    return busy_host(
        *ops, pages=rng.choice([1, 64, 700]), kernel=kernel, backing=rng.choice(backings),
        locked=rng.random() < 0.3, zone_movable=rng.random() < 0.3,
    )  # fmt: skip


def random_migration(rng: random.Random) -> Migration:
    """Draw a migration in the middle of the run, or none."""
    return Migration(
        kind=rng.choice([MigrationKind.NONE, *MigrationKind]), handling=rng.choice(list(Handling)), start_ps=300 * US,
        bandwidth_bytes_per_us=20_000, max_downtime_ps=20 * US, rounds=4, switch_ps=50 * US, dirty_bytes_per_us=5000,
        working_set_pages=200, retry_ps=20 * US, request_ps=10 * US, abort=rng.random() < 0.3,
        cancel_round=rng.choice([0, 0, 2]),
    )  # fmt: skip


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
        driver=rng.choice([GuestDriver.LINUX, *GuestDriver]),
        period_ops=rng.choice([256, 512, 1024]), jitter=rng.random() < 0.5, type_filter=rng.choice([0, 0, 1, 6]),
        event_filter=rng.choice([0, 0, 4]), min_latency_cycles=rng.choice([0, 0, 20]),
        renew_ps=rng.choice([0, 0, 400 * US]), task_off_ps=rng.choice([0, 60 * US]),
        reader_latency_ps=rng.choice([10 * US, 200 * US]), acts=random_acts(rng),
    )  # fmt: skip
    the_kvm = kvm(
        exit_interval_ps=rng.choice([0, 40 * US]), preempt_interval_ps=rng.choice([0, 300 * US]),
        memlock_pages=rng.choice([3, 64, 2048]), irq_delivery=rng.choice(list(IrqDelivery)),
    )  # fmt: skip
    hosts = [Host(), busy_host(), busy_host(HostOp.MOVE), busy_host(HostOp.KSM, HostOp.FORK, HostOp.RECLAIM)]
    host = rng.choice([*hosts, random_host(rng), random_host(rng)])
    name = rng.choice(POLICIES)
    fields: dict[str, Any] = {}
    if name in ("eager_pin", "pin_on_fault", "synthetic_fault"):
        fields["pin_stage1_tables"] = rng.random() < 0.5
    if name == "eager_pin":
        fields |= {"keep_mapped": rng.random() < 0.5, "el0_only": rng.choice(["error", "first_fault"])}
    return (
        name,
        fields,
        scenario(
            duration_ps=MS,
            migration=random_migration(rng),
            cpu=cpu,
            guest=the_guest,
            kvm=the_kvm,
            host=host,
            seed=rng.randrange(1000),
        ),
    )
