"""The guest's program: what it executes, when profiling is wanted, and what a filter by level leaves out."""

from __future__ import annotations

import numpy as np
import pytest

from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.machine.scenario import SessionMode

from ..properties.scenarios import MS, QUIET, guest, policy, scenario

USER0, USER1, KERNEL, OTHER_USER, OTHER_KERNEL, DRIVER = range(6)
rare = {"period_ops": 1 << 20, "buffer_pages": 64}  # hardly any sample, so hardly any interrupt


def run(lanes: int = 40, duration_ms: int = 10, **changes: object) -> Result:
    where = scenario(kvm=QUIET, guest=guest(**(rare | changes)), duration_ps=duration_ms * MS)
    return simulate(where, policy("bare_metal"), name="bare_metal", replicates=range(lanes))


def test_the_program_spends_its_time_as_described() -> None:
    """Phases in turn, of their mean lengths; in each, system calls of their mean length after their mean gap at EL0."""
    result = run(lanes=100, duration_ms=20, task_off_ps=0)
    w = result.scenario.workload
    share = w.syscall_ps / (w.syscall_ps + w.syscall_gap_ps)
    expected = np.array([*(w.phase_ps * (1 - share)), (w.phase_ps * share).sum()]) / w.phase_ps.sum()
    spent = result.exposure_ps.sum(axis=(0, 1))[[USER0, USER1, KERNEL]]
    assert np.allclose(spent / spent.sum(), expected, rtol=0.08)


def test_a_task_is_profiled_while_it_runs_and_a_cpu_always() -> None:
    """Per task: the time of the other task is not wanted. Per CPU: it is, and all of the time is."""
    task = run(task_on_ps=300 * MS // 1000, task_off_ps=100 * MS // 1000, session=SessionMode.PER_TASK)
    cpu = run(task_on_ps=300 * MS // 1000, task_off_ps=100 * MS // 1000, session=SessionMode.PER_CPU)
    assert task.exposure_ps[:, :, [OTHER_USER, OTHER_KERNEL]].sum() == 0
    assert (cpu.exposure_ps[:, :, OTHER_USER] > 0).all()
    wanted = task.truth["wanted_ps"].sum() / task.vcpu["now_ps"].sum()
    assert abs(wanted - 0.75) < 0.05
    assert (cpu.truth["wanted_ps"] > 0.999 * cpu.vcpu["now_ps"]).all()


@pytest.mark.parametrize(("user", "kernel"), [(True, False), (False, True), (True, True)])
def test_only_the_levels_that_were_asked_for_are_wanted_and_sampled(user: bool, kernel: bool) -> None:
    result = run(profile_user=user, profile_kernel=kernel, period_ops=512)
    at_el0, at_el1 = [USER0, USER1], [KERNEL, DRIVER]
    assert (result.exposure_ps[:, :, at_el0].sum() > 0) == user
    assert (result.exposure_ps[:, :, KERNEL].sum() > 0) == kernel
    if not kernel:
        assert result.exposure_ps[:, :, at_el1].sum() == 0
    assert (result.truth["written"] > 0).all()


def test_time_is_wanted_active_or_black() -> None:
    result = run(period_ops=256, buffer_pages=4)
    t = result.truth
    assert np.array_equal(t["wanted_ps"], t["active_ps"] + result.blackout_ps.sum(axis=2))
    assert np.array_equal(t["wanted_ps"], result.exposure_ps.sum(axis=2))
    assert (t["active_ps"] < t["wanted_ps"]).all()


def test_a_new_session_starts_with_a_fresh_interval_and_an_empty_ring() -> None:
    """Sessions that come again and again: samples are those of the interval, and what was written is kept."""
    result = run(renew_ps=MS, task_off_ps=0, period_ops=1024)
    t = result.truth
    assert (t["sessions"] > 4).all()
    assert np.array_equal(t["written"], t["kept"])
    expected = t["wanted_ops"].sum() / 1153  # 1024 + 1 + 127.5 operations between two
    assert abs(t["selected"].sum() / expected - 1) < 0.05
