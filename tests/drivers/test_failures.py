"""What the guest is told of a failure (kvm.md 2.4, E1 to E12), and what the drivers of three systems then do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from spepolicy.batch import Vcpus
from spepolicy.catalogue.answering import ANSWERS, Answering
from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.errors import HookError
from spepolicy.hookspecs import Failure, hookimpl
from spepolicy.judge.records import check_conservation, check_profile, check_time
from spepolicy.machine.scenario import Cpu, GuestDriver, Scenario, SessionMode
from spepolicy.machine.state import LostCause

from ..properties.scenarios import MS, QUIET, US, conserved, guest, scenario

EVENTS = ("E1", "E2", "E4", "E7", "E8")  # those that end in PMBSR_EL1
DEADLY = {"E3": Failure.SERROR, "E6": Failure.RUN_ERROR, "E11": Failure.HOST_PANIC}


def machine(driver: GuestDriver = GuestDriver.LINUX, **changes: Any) -> Scenario:
    """Buffers that stage 2 has not mapped: the first record of each session faults; sessions of a CPU, 16 pages."""
    values: dict[str, Any] = {
        "driver": driver, "session": SessionMode.PER_CPU, "task_off_ps": 0, "buffer_mapped": False, "buffer_pages": 16,
        "reader_latency_ps": 10 * US,
    }  # fmt: skip
    return scenario(guest=guest(**(values | changes)), kvm=QUIET, duration_ps=2 * MS)


def run(name: str, where: Scenario, lanes: int = 3) -> Result:
    result = simulate(where, Answering(name), name="answering", replicates=range(lanes), threads=1)
    assert conserved(result).all()
    check_conservation(result)
    check_profile(result)
    check_time(result)
    assert (result.truth["stage2_faults"].sum(axis=1) > 0).all()
    return result


@pytest.mark.parametrize("driver", list(GuestDriver), ids=lambda driver: driver.name)
@pytest.mark.parametrize("name", [*ANSWERS, "E9"])
def test_every_answer_to_every_driver_accounts_for_every_record(name: str, driver: GuestDriver) -> None:
    result = run(name, machine(driver, vcpus=2, renew_ps=600 * US))
    assert (result.vm["finished"] == 1).all()
    assert (result.vm["died"] == int(DEADLY.get(name, 0))).all()


class Told(NamedTuple):
    """What the driver did, of a whole run: events it called fatal, of these without a flag, handles truncated."""

    fatal: bool
    silent: bool
    truncated: bool


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("E1", Told(True, True, False)),  # EC 0x25 without DL: off, and perf does not know (spe.md 3.4)
        ("E2", Told(True, True, False)),  # EA is never looked at
        ("E4", Told(True, False, True)),  # DL truncates: perf knows, and starts again
        ("E7", Told(True, True, False)),  # as E1: nobody touched PMBSR_EL1
        ("E8", Told(True, True, False)),  # EC 0 and BSC 4: unknown event
        ("E5", Told(False, False, False)), ("E10", Told(False, False, False)), ("E12", Told(False, False, False)),
    ],
)  # fmt: skip
def test_linux(name: str, told: Told) -> None:
    truth = run(name, machine(), lanes=4).truth
    assert bool(truth["fatal"].sum()) == told.fatal
    assert bool(truth["silent_fatal"].sum()) == told.silent
    assert bool(truth["truncated"].sum()) == told.truncated


def test_linux_goes_on_by_itself_only_after_a_truncation() -> None:
    """E4 restarts when perf has read; E1 leaves a CPU-wide event dead for good, with the event nominally active."""
    silent, loud = run("E1", machine()), run("E4", machine())
    assert (silent.truth["sessions"] == 1).all()
    assert (silent.vcpu["event_active"] == 1).all()
    assert (silent.truth["written"] == 0).all()
    assert (loud.truth["sessions"] > 1).all()
    assert (loud.truth["written"] > 0).all()


@pytest.mark.parametrize("name", EVENTS)
def test_freebsd_ends_the_session_on_every_cpu(name: str) -> None:
    """arm_spe_error(): the fault of one vCPU switches the others off too; their half buffers are lost."""
    truth = run(name, machine(GuestDriver.FREEBSD, vcpus=3)).truth
    assert (truth["fatal"].sum(axis=1) >= 1).all()
    assert (truth["sessions"] <= 1).all()
    again = run(name, machine(GuestDriver.FREEBSD, vcpus=3, renew_ps=300 * US)).truth
    assert (again["sessions"].sum(axis=1) > 3).all(), "user space begins another session"


def test_freebsd_goes_on_after_a_full_buffer() -> None:
    where = machine(GuestDriver.FREEBSD, buffer_mapped=True)
    result = simulate(where, Answering("E1"), name="answering", replicates=range(3), threads=1)
    assert conserved(result).all()
    assert (result.truth["buffer_full"] > 2).all()
    assert (result.truth["fatal"] == 0).all()
    assert (result.truth["sessions"] > 2).all()


@pytest.mark.parametrize("name", [*EVENTS, "full"])
def test_windows_does_not_notice(name: str) -> None:
    """No handler: one stop, whatever its reason, ends the profile until the user stops; what was written is kept."""
    where = machine(GuestDriver.WINDOWS, buffer_mapped=name == "full")
    result = simulate(where, Answering("E1" if name == "full" else name), name="a", replicates=range(3), threads=1)
    assert conserved(result).all()
    truth = result.truth
    assert (truth["fatal"] + truth["spurious"] + truth["truncated"] == 0).all()
    assert (truth["buffer_full"] + truth["stage2_faults"] == 1).all()
    assert (truth["sessions"] == 1).all()
    assert np.array_equal(truth["kept"], truth["written"])
    black = result.blackout_ps.sum(axis=2)
    assert (black > 0.5 * truth["wanted_ps"]).all()


@pytest.mark.parametrize("name", DEADLY)
def test_the_vm_ends(name: str) -> None:
    """E3, E6, E11: nothing is executed any more, and what nobody has read by then is lost."""
    result = run(name, machine(vcpus=2))
    assert (result.vm["died"] == DEADLY[name]).all()
    assert (result.vcpu["now_ps"] < result.scenario.duration_ps).all()
    assert (result.truth["in_flight"] == 0).all()


def test_a_guest_without_spe_is_not_told() -> None:
    """E5: the registers read as if all were well, the profile is empty."""
    result = run("E5", machine())
    assert (result.vcpu["spe_off"] == 2).all()
    assert (result.truth["written"] == 0).all()
    assert (result.truth["fatal"] == 0).all()
    assert (result.blackout_ps.sum(axis=2) > 0.99 * result.truth["wanted_ps"]).all()


def test_a_side_channel_reports_the_blackout_that_it_ends() -> None:
    """E12: what is reported is what was black because of the fault; E10 marks a collision instead."""
    result = run("E12", machine())
    black = result.blackout_ps[:, :, LostCause.STAGE2_NOT_PINNED]
    assert (result.truth["reported_ps"] == black).all()
    assert (black > 0).all()
    collided = run("E10", machine())
    assert (collided.truth["reported_ps"] == 0).all()
    assert (collided.truth["written"] > 0).all()


def test_the_vmm_raises_the_limit_and_the_guest_does_not_notice() -> None:
    """E9: KVM_EXIT_RLIMIT with raise and retry, as inferred in kvm.md 2.4."""
    where = scenario(guest=machine().guest, duration_ps=MS)
    where = Scenario(workload=where.workload, guest=where.guest, duration_ps=MS, kvm=type(QUIET)(
        exit_interval_ps=0, preempt_interval_ps=0, memlock_pages=2))  # fmt: skip
    result = run("E9", where)
    assert (result.truth["fatal"] == 0).all()
    assert (result.truth["written"] > 0).all()
    assert (result.vm["pin_refused"] > 0).all()


def test_records_of_variable_size_are_discarded_by_linux_only() -> None:
    """DL with records that have no fixed size: Linux throws the buffer away, FreeBSD's error path loses it too."""
    cpu = Cpu(max_record_bytes=64, align_bytes=1, data_loss_at_boundary=True)
    for driver in (GuestDriver.LINUX, GuestDriver.FREEBSD):
        where = machine(driver)
        result = run("E4", Scenario(workload=where.workload, guest=where.guest, kvm=where.kvm, cpu=cpu, duration_ps=MS))
        assert (result.truth["injected_impdef"] > 0).all()


def test_a_failure_must_be_one() -> None:
    @dataclass
    class Wrong(Answering):
        """Answer with a number."""

        @hookimpl
        def stage2_fault(self, faults: Vcpus) -> None:
            faults.fail(3)  # type: ignore[arg-type]

    with pytest.raises(HookError, match=r"spepolicy\.hookspecs\.Failure"):
        simulate(machine(), Wrong("E1"), name="wrong", replicates=[0])
