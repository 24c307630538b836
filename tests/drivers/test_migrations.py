"""Live migrations in whole runs: what each handling costs a profiling guest, and that the laws hold throughout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from spepolicy.batch import Vcpus, Vms
from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import record_lane, simulate
from spepolicy.hookspecs import Cause, Event, Trap, hookimpl
from spepolicy.judge.metrics import measure
from spepolicy.judge.records import check_conservation, check_profile, check_time
from spepolicy.machine.hostops import Backing, HostOp
from spepolicy.machine.scenario import Handling, Migration, MigrationKind, Scenario
from spepolicy.machine.state import LostCause
from spepolicy.machine.trace import LogKind

from ..properties.scenarios import MS, POLICIES, QUIET, US, busy_host, conserved, guest, policy, scenario

KINDS = [kind for kind in MigrationKind if kind]
POSTCOPY_HANDLINGS = (Handling.PLAIN, Handling.STOP_TRAP, Handling.PREFAULT_TARGET, Handling.UNLOCK_RELOCK)
CASES = [(MigrationKind.PRECOPY, h) for h in Handling] + [(MigrationKind.POSTCOPY, h) for h in POSTCOPY_HANDLINGS]


def migration(
    kind: MigrationKind = MigrationKind.PRECOPY, handling: Handling = Handling.PLAIN, **changes: Any
) -> Migration:
    values: dict[str, Any] = {
        "start_ps": 200 * US, "bandwidth_bytes_per_us": 20_000, "max_downtime_ps": 20 * US, "rounds": 4,
        "switch_ps": 50 * US, "dirty_bytes_per_us": 5000, "working_set_pages": 200, "retry_ps": 20 * US,
        "request_ps": 10 * US,
    }  # fmt: skip
    return Migration(kind=kind, handling=handling, **(values | changes))


def run(policy_: Any, where: Scenario, lanes: int = 3, name: str = "policy") -> Result:
    result = simulate(where, policy_, name=name, replicates=range(lanes), threads=1)
    assert conserved(result).all()
    check_conservation(result)
    check_profile(result)
    check_time(result)
    return result


@dataclass
class Pinning:
    """Pin buffer and tables when the buffer becomes enabled; resume after repair; note what migrations say."""

    answer_migration: bool = True
    said: list[tuple[str, int, int, list[int]]] = field(default_factory=list)

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        self.pin(vcpus)

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.MIGRATION)
        walk = faults.walk_stage1(faults.buffer_lo, faults.buffer_hi, pin_tables=True)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
        pinned.no_page.inject(Event.IMPDEF, data_loss=True)
        pinned.ok.unpin_previous()
        pinned.ok.resume()

    @hookimpl
    def migration_started(self, vms: Vms, vcpus: Vcpus) -> None:
        self.said.append(("started", len(vms), len(vcpus), vcpus.pinned_pages.tolist()))

    @hookimpl
    def migration_finished(self, vms: Vms, vcpus: Vcpus) -> None:
        self.said.append(("finished", len(vms), len(vcpus), vcpus.pinned_pages.tolist()))
        if self.answer_migration:
            self.pin(vcpus.where((vcpus.pmblimitr & 1 != 0) & (vcpus.pmbsr & (1 << 17) == 0)))

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    def pin(self, vcpus: Vcpus) -> None:
        walk = vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi, pin_tables=True)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
        pinned.no_page.inject(Event.IMPDEF, data_loss=True)
        pinned.ok.unpin_previous()


@pytest.mark.parametrize(("kind", "handling"), CASES, ids=lambda value: value.name)
@pytest.mark.parametrize("name", POLICIES)
def test_the_laws_hold_and_the_migration_ends(kind: MigrationKind, handling: Handling, name: str) -> None:
    """Two vCPUs on a busy host; bare metal stays where it is."""
    where = scenario(guest=guest(vcpus=2, task_off_ps=20 * US), migration=migration(kind, handling),
                     host=busy_host(HostOp.RECLAIM, HostOp.KSM, HostOp.MOVE), duration_ps=2 * MS)  # fmt: skip
    result = run(policy(name), where, name=name)
    if name == "bare_metal":
        assert (result.vm["migration_outcome"] == 0).all()
        return
    ended = result.vm["migration_outcome"] == 1
    assert ended.any() if handling in (Handling.REFUSE, Handling.EXIT_ON_ENABLE) else ended.all()
    assert (result.vm["blocked"] == 0).all()
    assert (result.vm["migration_sent"][ended] >= 1024).all()
    assert (result.vm["finished"] == 1).all()
    if handling is not Handling.UNREPORTED:
        assert (result.vm["migration_unlogged"] == 0).all()


def test_a_policy_that_pins_is_told_and_can_repair_before_the_vcpus_run() -> None:
    where = scenario(
        guest=guest(vcpus=2, task_off_ps=0), migration=migration(handling=Handling.REPORT_DIRTY), kvm=QUIET
    )
    told, deaf = Pinning(), Pinning(answer_migration=False)
    with_hook, without = run(told, where), run(deaf, where)
    for word in ("started", "finished"):
        batches = [said for said in told.said if said[0] == word]
        assert sum(vms for _, vms, _, _ in batches) == 3
        assert all(vcpus == 2 * vms == len(pinned) for _, vms, vcpus, pinned in batches)
        everyone = [count for _, _, _, pinned in batches for count in pinned]
        assert (min(everyone) > 0) if word == "started" else (max(everyone) == 0), "nothing is pinned on the target"
    assert with_hook.truth["stage2_faults"].sum() == 0
    assert without.truth["stage2_faults"].sum() > 0
    assert without.lost[:, :, LostCause.STAGE2_MIGRATION].sum() == without.truth["stage2_faults"].sum()
    assert without.claims[:, Cause.MIGRATION, Cause.MIGRATION].sum() == without.truth["stage2_faults"].sum()


def test_plain_dirty_logging_makes_the_spu_fault_in_every_round() -> None:
    roomy = guest(task_off_ps=0, buffer_pages=64)  # else it is waiting for its reader most of the time
    calm = scenario(guest=roomy, kvm=QUIET)
    logged = scenario(guest=roomy, kvm=QUIET, migration=migration(max_downtime_ps=1, rounds=4))
    assert run(Pinning(), calm).truth["stage2_faults"].sum() == 0
    result = run(Pinning(), logged)
    assert (result.truth["stage2_faults"].sum(axis=1) >= 3).all()
    assert (result.blackout_ps[:, :, LostCause.STAGE2_MIGRATION].sum(axis=1) > 0).all()


@pytest.mark.parametrize("handling", [Handling.STOP_TRAP, Handling.UNLOCK_RELOCK], ids=lambda h: h.name)
def test_stopping_spe_blacks_out_the_whole_migration(handling: Handling) -> None:
    """kvm.md 4.4 L6: from the begin to the end, as far as the guest executes and is profiled."""
    where = scenario(guest=guest(task_off_ps=0, buffer_pages=64), kvm=QUIET, migration=migration(handling=handling))
    result = run(Pinning(), where)
    vm = result.vm
    executed = vm["migration_end_ps"] - vm["migration_begin_ps"] - vm["migration_downtime_ps"]
    black = result.blackout_ps[:, :, LostCause.MIGRATION].sum(axis=1)
    assert (black <= executed).all()
    assert (black >= executed - 50 * US).all(), "but for what traps and the reader's interrupts take"


@pytest.mark.parametrize(
    "handling", [Handling.EXIT_ON_ENABLE, Handling.STOP_EXIT, Handling.EXIT_WHILE_LOGGING], ids=lambda h: h.name
)
def test_a_vmm_holds_the_vcpu_or_gives_the_migration_up(handling: Handling) -> None:
    """Held vCPUs stall, and no blackout is theirs: they do not execute."""
    held, given_up = (
        run(
            Pinning(),
            scenario(guest=guest(task_off_ps=60 * US), kvm=QUIET, migration=migration(handling=handling, abort=abort)),
        )
        for abort in (False, True)
    )
    assert (held.truth["stalled_ps"].sum(axis=1) > 100 * US).all()
    assert (held.vm["migration_outcome"] == 1).all()
    assert (given_up.vm["migration_outcome"] == 3).all()
    assert (given_up.truth["stalled_ps"] == 0).all()
    assert (held.truth["vmm_exits"] == 1).all()


def test_the_metrics_of_a_migration() -> None:
    where = scenario(guest=guest(task_off_ps=0), kvm=QUIET, migration=migration(max_downtime_ps=1, rounds=3))
    values = measure(run(Pinning(), where), None).values
    vm = run(Pinning(), where).vm
    assert values["migration_downtime_ms"] == pytest.approx(vm["migration_downtime_ps"].mean() / 1e9)
    assert values["migration_total_ms"] > values["migration_downtime_ms"]
    assert values["migration_rounds"] == 3
    assert values["migration_resent_MiB"] > values["migration_resent_buffer_MiB"] > 0
    assert values["migration_completed_pct"] == 100
    assert "migration_downtime_ms" not in measure(run(Pinning(), scenario()), None).values


def test_the_log_tells_the_steps() -> None:
    where = scenario(migration=migration(), kvm=QUIET)
    rows = record_lane(where, Pinning(), name="pinning", replicate=0).rows
    steps = rows[rows["kind"] == LogKind.MIGRATED]
    assert steps["detail"].tolist() == [1] * (len(steps) - 2) + [2, 5]
    assert (np.diff(steps["host_ps"]) > 0).all()


def test_without_a_migration_nothing_changes() -> None:
    later = migration(start_ps=10**15)
    plain, waiting = (run(Pinning(), scenario(migration=m)) for m in (Migration(), later))
    for name in ("digest", "selected", "kept", "wanted_ps", "active_ps", "stage2_faults"):
        assert np.array_equal(plain.truth[name], waiting.truth[name]), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("backing", list(Backing), ids=lambda backing: backing.name)
def test_any_backing_of_the_guest_s_memory_can_be_migrated(kind: MigrationKind, backing: Backing) -> None:
    """Blocks of stage 2 are write-protected whole and broken for the log; in post-copy pages come one by one."""
    host = replace(busy_host(HostOp.NUMA_SCAN, interval_ps=200 * US), backing=backing)
    where = scenario(
        guest=guest(vcpus=2, task_off_ps=20 * US), migration=migration(kind), host=host, duration_ps=2 * MS
    )
    result = run(Pinning(), where)
    assert (result.vm["migration_outcome"] == 1).all()
    assert result.truth["written"].sum() > 0
    assert (result.truth["diverged_records"] == 0).all()
