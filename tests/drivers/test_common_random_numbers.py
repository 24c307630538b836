"""Policies at one seed see one program and one host, so that their differences are paired."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spepolicy.drivers.simulate import simulate
from spepolicy.machine.hostops import HostOp

from ..machine.interpreted import module
from ..properties.scenarios import MS, POLICIES, QUIET, US, busy_host, guest, policy, scenario

busy = scenario(host=busy_host(HostOp.NUMA_SCAN, HostOp.RECLAIM), guest=guest(buffer_mapped=False))


def _program(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Return the segments that the program chose, in order: (level, distribution, length)."""
    guest_module, log = module("machine.guest"), []
    choose = guest_module._next_program_segment

    def watched(m: Any, i: int, k: int) -> None:
        choose(m, i, k)
        v = m.vcpu[i, k]
        if v["segment"] <= 1:
            log.append((int(v["level"]), int(v["distribution"]), int(v["segment_ps"])))

    monkeypatch.setattr(guest_module, "_next_program_segment", watched)
    shipped = module(f"spepolicy_plugins.{name}")
    instance = getattr(shipped, "".join(part.capitalize() for part in name.split("_")))()
    module("drivers.simulate").simulate(busy, instance, name=name, replicates=[3], threads=1)
    monkeypatch.undo()
    return log


def test_every_policy_sees_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts and the driver's code delay the program and never change it: one is the beginning of the other."""
    programs = {name: _program(name, monkeypatch) for name in POLICIES}
    longest = max(programs.values(), key=len)
    assert len(set(longest)) > 30
    assert {distribution for _, distribution, _ in longest} == {0, 1, 2, 3, 4}, (
        "both phases, system calls, the other task"
    )
    for name, program in programs.items():
        assert len(program) > 0.7 * len(longest), name
        assert program == longest[: len(program)], name


def test_every_policy_sees_the_same_host() -> None:
    """The host's clock does not stop for the guest: who takes longer sees more of the same events, never others."""
    results = {name: simulate(busy, policy(name), name=name, replicates=range(6)) for name in POLICIES[1:]}
    for lane in range(6):
        runs = sorted(results.values(), key=lambda result: result.vm["host_events"][lane])
        for less, more in itertools.pairwise(runs):
            assert (less.host_ops[lane] <= more.host_ops[lane]).all()
            assert less.vm["host_next_ps"][lane] <= more.vm["host_next_ps"][lane]
            if less.vm["host_events"][lane] == more.vm["host_events"][lane]:
                assert less.vm["host_next_ps"][lane] == more.vm["host_next_ps"][lane]
        assert runs[0].vm["host_events"][lane] > 50


@pytest.mark.parametrize("name", ["eager_pin", "pin_on_fault"])
def test_preemptions_do_not_move_the_samples(name: str) -> None:
    """Streams are separate, and the guest's time stands still meanwhile. (No buffer is full here: each world switch
    drains the record in flight, which may bring that event forward by some ns.)
    """
    roomy = guest(task_off_ps=0, buffer_pages=256, period_ops=1024)
    never = replace(QUIET, memlock_pages=4096)
    often = replace(never, preempt_interval_ps=100 * US, preempt_ps=10 * US)
    calm, stirred = (
        simulate(
            scenario(guest=roomy, kvm=kvm, duration_ps=2 * MS), policy(name), name=name, replicates=range(4), threads=1
        )
        for kvm in (never, often)
    )
    assert (stirred.truth["preemptions"] > 0).all()
    assert stirred.truth["buffer_full"].sum() == 0
    for field in ("selected", "collided", "written", "digest"):
        assert np.array_equal(calm.truth[field], stirred.truth[field]), field
    assert np.array_equal(calm.exposure_ps, stirred.exposure_ps)
    assert (stirred.host_elapsed_ps > calm.host_elapsed_ps).all()
