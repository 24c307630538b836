"""Misbehaving guests in whole runs: when they act, whom it hurts, and that every record is accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from spepolicy.batch import Vcpus, Vms
from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import record_lane, simulate
from spepolicy.hookspecs import Cause, Event, Trap, hookimpl
from spepolicy.judge.records import check_conservation, check_profile, check_time
from spepolicy.machine.guestacts import GuestAct, Moment
from spepolicy.machine.scenario import Kvm, Scenario
from spepolicy.machine.state import LostCause
from spepolicy.machine.trace import LogKind

from ..properties.scenarios import MS, POLICIES, QUIET, US, conserved, guest, kvm, policy, scenario

RESTORE = (int(GuestAct.RESTORE), 40 * US, 0, int(Moment.ANY), 1, 1)


@dataclass
class PinWhileEnabled:
    """Pin the buffer when it becomes enabled, tell the guest of every fault: the contract that the acts go against."""

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        walk = vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi, pin_tables=True)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
        pinned.no_page.inject(Event.IMPDEF, data_loss=True)
        pinned.ok.unpin_previous()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.GUEST)
        faults.inject(Event.IMPDEF, data_loss=True)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()


def run(policy_: Any, scenario_: Scenario, lanes: int = 4, name: str = "policy") -> Result:
    result = simulate(scenario_, policy_, name=name, replicates=range(lanes), threads=1)
    assert conserved(result).all()
    check_conservation(result)
    check_profile(result)
    check_time(result)
    return result


@pytest.mark.parametrize("act", GuestAct, ids=lambda act: act.name)
@pytest.mark.parametrize("name", POLICIES)
def test_records_are_conserved_whatever_the_guest_does(act: GuestAct, name: str) -> None:
    acts = ((int(act), 60 * US, 0, 0, 1, 2), (int(act), 90 * US, 0, int(Moment.PROFILING), 0, 1), RESTORE)
    result = run(policy(name), scenario(guest=guest(acts=acts, buffer_mapped=False), duration_ps=MS), name=name)
    assert (result.truth["acts"] > 0).all()
    assert result.truth["selected"].sum() > 0


def test_a_remap_before_the_eret_defeats_every_pin_at_enable() -> None:
    """kvm.md 4.1 G1 and G2: legal, behind KVM's back. The first record of each such session faults, by the guest."""
    remap = (int(GuestAct.REMAP), 100 * US, 0, int(Moment.BEFORE_ERET), 1, 4)
    el0 = guest(profile_kernel=False, buffer_mapped=False)
    lawful = run(PinWhileEnabled(), scenario(guest=el0, kvm=QUIET))
    unlawful = run(
        PinWhileEnabled(), scenario(guest=guest(profile_kernel=False, buffer_mapped=False, acts=(remap,)), kvm=QUIET)
    )
    assert lawful.truth["stage2_faults"].sum() == 0
    faults = int(unlawful.truth["stage2_faults"].sum())
    assert faults > 10
    assert unlawful.lost[:, :, LostCause.STAGE2_GUEST].sum() == faults
    assert unlawful.claims[:, Cause.GUEST, Cause.GUEST].sum() == faults
    assert unlawful.blackout_ps[:, :, LostCause.STAGE2_GUEST].sum() > 0


@pytest.mark.parametrize(
    ("moment", "enabled"), [(Moment.BEFORE_ERET, True), (Moment.PROFILING, True), (Moment.DISABLED, False)]
)
def test_acts_happen_at_their_moment(moment: Moment, enabled: bool) -> None:
    """Seen from the log: PMBLIMITR_EL1.E as last written, and whether the SPU samples before, or from then on."""
    act = (int(GuestAct.RESTORE), 50 * US, 0, int(moment), 1, 1)
    where = scenario(guest=guest(profile_kernel=False, acts=(act,)), kvm=QUIET)
    rows = record_lane(where, policy("bare_metal"), name="bare_metal", replicate=0).rows
    limit, sampling, acts = 0, 0, 0
    for n, row in enumerate(rows):
        if row["kind"] == LogKind.REGISTER and row["detail"] == 5:
            limit = int(row["a"])
        elif row["kind"] == LogKind.PROFILING:
            sampling = int(row["detail"])
        elif row["kind"] == LogKind.GUEST_ACT:
            acts += 1
            assert bool(limit & 1) == enabled
            if moment is Moment.BEFORE_ERET:
                assert not sampling
            if moment is Moment.PROFILING:
                then = rows[n:][rows["kind"][n:] == LogKind.PROFILING]
                assert sampling or then["detail"][0] == 1
    assert acts > 5


def test_a_guest_hurts_itself_only() -> None:
    """Two guests of one host would share nothing here; two vCPUs of one guest share tables, and each has its buffer."""
    acts = ((int(GuestAct.UNMAP), 50 * US, 0, int(Moment.PROFILING), 1, 4),)
    result = run(policy("eager_pin"), scenario(guest=guest(vcpus=2, acts=acts), kvm=kvm(memlock_pages=2048)))
    assert (result.lost[:, :, LostCause.STAGE1_FAULT] > 0).all()
    others = [c for c in LostCause if c not in (LostCause.STAGE1_FAULT, LostCause.BUFFER_FULL, LostCause.RING_FULL)]
    assert result.lost[:, :, others].sum() == 0


def test_cycling_buffers_holds_one_buffer_of_pins_a_vcpu() -> None:
    """G7: a policy that unpins the buffer before holds two buffers of pins at most, and gives all of them back."""
    cycle = (int(GuestAct.CYCLE), 20 * US, 0, int(Moment.ANY), 1, 1)
    spacious = kvm(memlock_pages=10**6)
    cycled = run(PinWhileEnabled(), scenario(guest=guest(acts=(cycle,)), kvm=spacious))
    assert (cycled.truth["sessions"] > 30).all()
    tables = 8  # a buffer page has four tables above it, which are pinned once a 2 MiB
    assert (cycled.vm["pinned_peak_pages"] <= 2 * (4 + tables)).all()
    assert (cycled.vm["pinned_pages"] == 0).all()
    assert (cycled.vm["pin_calls"] > 20 * cycled.vm["pinned_peak_pages"]).all()


def test_many_vcpus_exhaust_one_memlock_limit() -> None:
    """The limit is the VM's: those who come last are refused, and the VM goes on."""
    tight = Kvm(exit_interval_ps=0, preempt_interval_ps=0, memlock_pages=8 * 6)
    many = scenario(guest=guest(vcpus=16, ram_pages=1024), kvm=tight, duration_ps=MS // 2)
    result = run(PinWhileEnabled(), many, lanes=2)
    assert (result.vm["pinned_peak_pages"] <= 8 * 6).all()
    assert (result.vm["pin_refused"] > 0).all()
    assert (result.truth["refused"].sum(axis=1) > 0).all()
    assert (result.blackout_ps[:, :, LostCause.REFUSED].sum(axis=1) > 0).all()
    assert (result.vm["finished"] == 1).all()


@pytest.mark.parametrize("vcpus", [1, 3, 64])
def test_every_vcpu_has_a_buffer_of_its_own(vcpus: int) -> None:
    """Record for record, a vCPU of a silent VM writes what it writes on bare metal, however many there are."""
    where = scenario(guest=guest(vcpus=vcpus, ram_pages=4096), kvm=QUIET, duration_ps=MS // 2)
    metal, pinned = (run(policy(name), where, lanes=2, name=name) for name in ("bare_metal", "pin_vm"))
    assert np.array_equal(metal.truth["digest"], pinned.truth["digest"])
    assert (pinned.truth["written"] > 0).all()
    assert len(np.unique(pinned.vcpu["buffer_va"][0])) == vcpus
    first = simulate(scenario(guest=guest(vcpus=1, ram_pages=4096), kvm=QUIET, duration_ps=MS // 2), policy("pin_vm"),
                     name="pin_vm", replicates=range(2))  # fmt: skip
    assert np.array_equal(first.truth["written"][:, 0], pinned.truth["written"][:, 0]), "vCPU 0's program is the same"


def test_a_lawful_guest_draws_nothing() -> None:
    """Without acts nothing of the clock, the draws or the tables of a lane changes."""
    never = ((int(GuestAct.REMAP), 0, 50 * MS, 0, 1, 1),)  # after the end
    plain, armed = (run(policy("pin_on_fault"), scenario(guest=guest(acts=a))) for a in ((), never))
    for field in ("digest", "selected", "kept", "wanted_ps", "active_ps", "stage2_faults"):
        assert np.array_equal(plain.truth[field], armed.truth[field]), field
