"""A policy under test, and what it did in each scene."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import Runner, simulate
from spepolicy.errors import PluginError
from spepolicy.machine.scenario import Scenario
from spepolicy.platforms import equipped
from spepolicy.testing.scenes import SCENES

__all__ = ["LANES", "Subject", "differences"]

LANES = 5

ARRAYS = ("vm", "vcpu", "truth", "lost", "blackout_ps", "claims", "host_ops", "exposure_ps", "seen", "windows")


class Subject:
    """One policy. Runs are kept, so that checks share them."""

    def __init__(self, policy: object) -> None:
        """Take a copy of the instance *policy*, which is not changed."""
        self.policy = copy.deepcopy(policy)
        self.name = type(policy).__name__
        self._results: dict[str, Result] = {}

    @cached_property
    def virtualized(self) -> bool:
        """False for a bare-metal baseline."""
        return Runner(self.policy, self.name).behaviour.virtualized

    @cached_property
    def scenes(self) -> dict[str, Scenario]:
        """The scenes of the kit on which the policy can run: on a machine with all that it may need, where it must."""
        runner = Runner(self.policy, self.name)
        found = {}
        for name, scene in SCENES.items():
            for machine in (scene, equipped(scene)):
                if runner.why_unsupported(machine) is None:
                    found[name] = machine
                    break
        return found

    def some(self, *names: str) -> list[str]:
        """Return those of *names* on which the policy can run; another scene if it can run on none of them."""
        return [name for name in names if name in self.scenes] or list(self.scenes)[:1]

    def refusal(self) -> str:
        """Return why the policy does not run on the first scene."""
        return Runner(self.policy, self.name).why_unsupported(equipped(SCENES["quiet"])) or ""

    def result(self, scene: str) -> Result:
        """Return what the policy did in *scene*, in LANES lanes. Raises HookError."""
        if scene not in self._results:
            self._results[scene] = self.run(self.scenes[scene])
        return self._results[scene]

    def run(
        self, scenario: Scenario, replicates: Sequence[int] = range(LANES), policy: object = None, **changes: Any
    ) -> Result:
        """Run *scenario* with fields of it changed. *policy* stands in for the one under test. Raises HookError."""
        return simulate(
            replace(scenario, **changes), policy or self.policy, name=self.name, replicates=replicates, threads=1
        )

    def require_a_plugin(self) -> None:
        """Raise PluginError unless the policy can be registered with all its hooks."""
        from spepolicy.plugins import make_plugin_manager

        make_plugin_manager(self.policy, ())
        if not self.virtualized and type(self.policy).__dict__.get("stage2_fault"):
            raise PluginError("a policy that runs no VM has a hook stage2_fault, which is never called. Remove it.")


def differences(one: Result, other: Result, lanes: NDArray[np.int64] | None = None) -> list[str]:
    """Name the arrays in which two results differ: *other* in all its lanes, *one* in the same or in *lanes*."""
    chosen = np.arange(len(one.replicates)) if lanes is None else lanes
    differ = []
    for name in ARRAYS[:-1]:
        if not np.array_equal(getattr(one, name)[chosen], getattr(other, name)):
            differ.append(name)
    mine = [one.windows[one.windows["lane"] == lane] for lane in chosen]
    theirs = [other.windows[other.windows["lane"] == lane] for lane in range(len(chosen))]
    fields = [name for name in one.windows.dtype.names or () if name != "lane"]
    if any(not np.array_equal(a[fields], b[fields]) for a, b in zip(mine, theirs, strict=True)):
        differ.append("windows")
    return differ
