"""Which lanes get files of their own: what `output.lanes`, `output.perf_data` and `output.timeline` ask for.

`spepolicy.lab.chosen_lanes` writes the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spepolicy.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from spepolicy.machine.scenario import Scenario

__all__ = ["NO_LANES", "ChosenLanes", "Lane", "check_guest", "check_policies", "parse_lanes"]

Lane = tuple[str, int]
"""Policy and replicate; the policy is empty for the one that the run is about."""

KEY = "output.lanes"


@dataclass(frozen=True)
class ChosenLanes:
    """What is to be written of which lanes."""

    lanes: tuple[Lane, ...] = ()
    perf_data: bool = False
    timeline: bool = False

    def any(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.lanes) and (self.perf_data or self.timeline)


NO_LANES = ChosenLanes()


def parse_lanes(values: Sequence[str], replicates: int) -> tuple[Lane, ...]:
    """Return the lanes that `output.lanes` names. Raises `ConfigurationError`."""
    lanes = []
    for value in values:
        policy, _, number = value.rpartition(":")
        if not number.isascii() or not number.isdecimal() or int(number) >= replicates:
            raise ConfigurationError(
                f"{KEY}=[{value}]: not REPLICATE or POLICY:REPLICATE, with REPLICATE below replicates={replicates}. "
                f"Write for example {KEY}=[0] or {KEY}=[bare_metal:0]."
            )
        lanes.append((policy, int(number)))
    return tuple(dict.fromkeys(lanes))


def check_policies(lanes: Sequence[Lane], policies: Mapping[str, object]) -> None:
    """Raise `ConfigurationError` for a policy that is not in this run."""
    for policy, replicate in lanes:
        if policy and policy not in policies:
            raise ConfigurationError(
                f"{KEY}=[{policy}:{replicate}]: policy '{policy}' is not in this run, which has {', '.join(policies)}."
                f"{nearest(policy, policies)} Add it with baselines=[{policy}], or name another."
            )


def check_guest(wanted: ChosenLanes, scenario: Scenario) -> None:
    """Raise `ConfigurationError` if perf.data is wanted of a guest that has no perf."""
    from spepolicy.machine.scenario import GuestDriver

    if wanted.perf_data and scenario.guest.driver != GuestDriver.LINUX:
        name = GuestDriver(scenario.guest.driver).name.lower()
        raise ConfigurationError(
            f"output.perf_data=true with guest.driver={name}: perf.data is what Linux's perf writes. Set "
            "guest.driver=linux, or output.timeline=true instead."
        )
