"""Files of single lanes: `output.perf_data=true`, `output.timeline=true`, of `output.lanes=[0,bare_metal:0]`.

A lane is run again with its event log on, which gives the same lane to the bit. Its log is written as the perf.data
that perf in its guest would have written (`spepolicy.perfdata.lane`), with the images that hold the functions' names
beside it, and as a timeline for Perfetto (`spepolicy.lab.timeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.lab import output

if TYPE_CHECKING:
    from spepolicy.drivers.simulate import LaneLog, Result
    from spepolicy.machine.scenario import Scenario

__all__ = [
    "NO_LANES",
    "ChosenLanes",
    "Lane",
    "check_guest",
    "check_policies",
    "parse_lanes",
    "perf_data_name",
    "timeline_name",
    "write_lanes",
]

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


def perf_data_name(policy: str, replicate: int) -> str:
    """Return the name of a lane's perf.data in the run folder."""
    return f"{policy}-{replicate}.perf.data"


def timeline_name(policy: str, replicate: int) -> str:
    """Return the name of a lane's timeline in the run folder."""
    return f"{policy}-{replicate}.pftrace"


def write_lanes(
    wanted: ChosenLanes,
    chosen: str,
    policies: Mapping[str, object],
    results: Mapping[str, Result],
    run_dir: Path,
    say: Callable[[str], None],
) -> list[Path]:
    """Write what is *wanted* of each lane that has finished; return all files.

    *chosen*, *policies*: the run's. *results*: by policy, of which the same lanes are run again with their log on.
    """
    files: list[Path] = []
    if not wanted.any():
        return files
    for policy, replicate in ((policy or chosen, replicate) for policy, replicate in wanted.lanes):
        result = results.get(policy)
        if result is None or not result.finished[result.replicates == replicate].any():
            continue  # an interruption left it out
        say(f"replicate {replicate} of {policy}: running its lane again with a log")
        log = _record(result, policies[policy], policy, replicate)
        if wanted.perf_data:
            files += _write_perf_data(log, run_dir, perf_data_name(policy, replicate))
        if wanted.timeline:
            files.append(_write_timeline(log, run_dir, policy, replicate))
    return list(dict.fromkeys(files))


def _record(result: Result, policy: object, name: str, replicate: int) -> LaneLog:
    from spepolicy.drivers.simulate import record_lane

    log = record_lane(result.scenario, policy, name=name, replicate=replicate)
    row = int((result.replicates == replicate).argmax())
    if log.result.truth[0].tobytes() != result.truth[row].tobytes():
        raise AssertionError(f"replicate {replicate} of {name} was not the same again: this is a bug in spepolicy")
    return log


def _write_perf_data(log: LaneLog, run_dir: Path, name: str) -> list[Path]:
    from spepolicy.perfdata.lane import lane_file
    from spepolicy.perfdata.program import KERNEL_FILE, PROGRAM_FILE, images

    files = []
    parts = images(log.result.scenario.workload)
    for image_name, image in ((PROGRAM_FILE, parts.program), (KERNEL_FILE, parts.kernel)):
        files.append(output.write_bytes(run_dir / image_name, image.content))
    files.append(output.write_bytes(run_dir / name, lane_file(log, run_dir).content))
    return files


def _write_timeline(log: LaneLog, run_dir: Path, policy: str, replicate: int) -> Path:
    from spepolicy.lab.timeline import write_timeline

    title = f"{policy}, replicate {replicate}, seed {log.result.scenario.seed}"
    return write_timeline(run_dir / timeline_name(policy, replicate), log, log.result.scenario.workload, title)
