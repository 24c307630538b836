"""A policy sees what KVM would see. Its decisions cannot depend on what only the judge knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from spepolicy.batch import Vcpus, Vms
from spepolicy.drivers import simulate as driver
from spepolicy.errors import HookError
from spepolicy.hookspecs import Event, Trap, hookimpl
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.state import Hook

from .scenarios import POLICIES, busy_host, policy, scenario

HIDDEN = (
    "truth", "lost", "blackout_ps", "claims", "exposure_ps", "seen", "unseen", "host_page", "window", "tlb", "pool",
)  # fmt: skip


def _arrays_reachable_from(thing: Any) -> Iterator[np.ndarray]:
    """Every array that attributes, private ones too, lead to from *thing*."""
    seen: set[int] = set()
    stack = [thing]
    while stack:
        current = stack.pop()
        if id(current) in seen or isinstance(current, type):
            continue
        seen.add(id(current))
        if isinstance(current, np.ndarray):
            yield current
            stack.append(current.base)
            continue
        slots = [name for cls in type(current).__mro__ for name in getattr(cls, "__slots__", ())]
        stack += [getattr(current, name) for name in slots if hasattr(current, name)]
        stack += list(getattr(current, "__dict__", {}).values())


def test_nothing_leads_from_a_batch_to_ground_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow every attribute of every batch that a hook gets: no array shares memory with what the judge reads."""
    checked = []
    call = driver._Chunk.call

    def checking(self: Any, hook: Hook, lanes: Any) -> None:
        hidden = [getattr(self.m, name) for name in HIDDEN]

        def look(batch: Any) -> None:
            for array in _arrays_reachable_from(batch):
                assert not any(np.shares_memory(array, secret) for secret in hidden)
            checked.append(type(batch).__name__)

        for cls in (Vcpus, Vms):
            make = cls.__init__

            def watched(batch: Any, *arguments: Any, make: Any = make) -> None:
                make(batch, *arguments)
                look(batch)

            monkeypatch.setattr(cls, "__init__", watched)
        try:
            call(self, hook, lanes)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(driver._Chunk, "call", checking)

    monkeypatch.setattr(driver._Chunk, "call", checking)
    driver.simulate(scenario(host=busy_host()), policy("eager_pin"), name="eager_pin", replicates=range(2), threads=1)
    assert {"Vcpus", "Vms"} <= set(checked)


@pytest.mark.parametrize("name", POLICIES)
def test_decisions_do_not_change_when_the_truth_is_garbage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a policy decides, what it must not know is turned upside down; the outcome is the same to the bit."""
    busy = scenario(host=busy_host(HostOp.NUMA_SCAN, HostOp.RECLAIM, HostOp.MOVE))
    honest = driver.simulate(busy, policy(name), name=name, replicates=range(4), threads=1)
    call = driver._Chunk.call

    def poisoned(self: Any, hook: Hook, lanes: Any) -> None:
        # Tools only add to these arrays, so garbage can be added before and subtracted after.
        noise = {n: np.random.default_rng(1).integers(1, 1 << 40, getattr(self.m, n).shape) for n in ("seen", "lost")}
        fields = ("selected", "written", "stage2_faults", "wanted_ps", "diverged_records")
        for array, values in noise.items():
            getattr(self.m, array)[...] += values
        for n, field in enumerate(fields):
            self.m.truth[field] += 12345 * (n + 1)
        cause = self.m.truth["fault_cause"].copy()
        try:
            call(self, hook, lanes)
        finally:
            for array, values in noise.items():
                getattr(self.m, array)[...] -= values
            for n, field in enumerate(fields):
                self.m.truth[field] -= 12345 * (n + 1)
            assert np.array_equal(cause, self.m.truth["fault_cause"])

    monkeypatch.setattr(driver._Chunk, "call", poisoned)
    garbled = driver.simulate(busy, policy(name), name=name, replicates=range(4), threads=1)
    for array in ("vm", "vcpu", "truth", "lost", "seen", "claims"):
        assert np.array_equal(getattr(honest, array), getattr(garbled, array)), array


class Hoarder:
    """A policy that keeps a batch for later."""

    kept: Any = None

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        if Hoarder.kept is not None:
            _ = Hoarder.kept.pmbptr
        Hoarder.kept = vcpus

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.IMPDEF)


def test_a_batch_is_void_when_its_hook_has_returned() -> None:
    import dataclasses

    Hoarder.kept = None
    with pytest.raises(HookError, match=r"Hoarder.*profiling_enabled.*used after its hook had returned"):
        driver.simulate(scenario(), dataclasses.dataclass(Hoarder)(), name="Hoarder", replicates=[0], threads=1)
