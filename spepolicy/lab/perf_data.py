"""perf.data of chosen lanes: `output.perf_data=true`, `output.perf_data_lanes=[0,bare_metal:0]`.

A lane is run again with its event log on, which gives the same lane to the bit, and is written as the perf.data that
perf in its guest would have written (`spepolicy.perfdata.lane`). The images with the functions' names lie beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.lab import output

if TYPE_CHECKING:
    from spepolicy.drivers.simulate import Result

__all__ = ["Lane", "file_name", "parse_lanes", "write_perf_data"]

Lane = tuple[str, int]
"""Policy and replicate; the policy is empty for the one that the run is about."""

KEY = "output.perf_data_lanes"


def parse_lanes(values: Sequence[str], replicates: int) -> tuple[Lane, ...]:
    """Return the lanes that `output.perf_data_lanes` names. Raises `ConfigurationError`."""
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


def file_name(policy: str, replicate: int) -> str:
    """Return the name of a lane's file in the run folder."""
    return f"{policy}-{replicate}.perf.data"


def write_perf_data(
    lanes: Sequence[Lane],
    chosen: str,
    policies: Mapping[str, object],
    results: Mapping[str, Result],
    run_dir: Path,
    say: Callable[[str], None],
) -> list[Path]:
    """Write the perf.data of each of *lanes* that has finished, and the images; return all files.

    *chosen*, *policies*: the run's. *results*: by policy, of which the same lanes are run again with their log on.
    """
    from spepolicy.drivers.simulate import record_lane
    from spepolicy.perfdata.lane import lane_file
    from spepolicy.perfdata.program import KERNEL_FILE, PROGRAM_FILE, images

    files: list[Path] = []
    for policy, replicate in ((policy or chosen, replicate) for policy, replicate in lanes):
        result = results.get(policy)
        if result is None or not result.finished[result.replicates == replicate].any():
            continue  # an interruption left it out
        if not files:
            parts = images(result.scenario.workload)
            for name, image in ((PROGRAM_FILE, parts.program), (KERNEL_FILE, parts.kernel)):
                content = image.content
                files.append(output.write_bytes(run_dir / name, content))
        say(f"writing {file_name(policy, replicate)}: running its lane again with a log")
        log = record_lane(result.scenario, policies[policy], name=policy, replicate=replicate)
        row = int((result.replicates == replicate).argmax())
        if log.result.truth[0].tobytes() != result.truth[row].tobytes():
            raise AssertionError(
                f"replicate {replicate} of {policy} was not the same again: this is a bug in spepolicy"
            )
        made = lane_file(log, run_dir)
        files.append(output.write_bytes(run_dir / file_name(policy, replicate), made.content))
    return files
