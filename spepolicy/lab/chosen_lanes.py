"""Files of single lanes: `output.perf_data=true`, `output.timeline=true`, of `output.lanes=[0,bare_metal:0]`.

A lane is run again with its event log on, which gives the same lane to the bit. Its log is written as the perf.data
that perf in its guest would have written (`spepolicy.perfdata.lane`), with the images that hold the functions' names
beside it, and as a timeline for Perfetto (`spepolicy.lab.timeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spepolicy.lab import output

if TYPE_CHECKING:
    from spepolicy.drivers.result import LaneLog, Result
    from spepolicy.lane_choice import ChosenLanes

__all__ = ["perf_data_name", "timeline_name", "write_lane", "write_lanes"]


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
        files += write_lane(wanted, log, run_dir, policy, replicate)
    return list(dict.fromkeys(files))


def write_lane(wanted: ChosenLanes, log: LaneLog, folder: Path, policy: str, replicate: int) -> list[Path]:
    """Write what is *wanted* of one lane; return its files."""
    files: list[Path] = []
    if wanted.perf_data:
        files += _write_perf_data(log, folder, perf_data_name(policy, replicate))
    if wanted.timeline:
        files.append(_write_timeline(log, folder, policy, replicate))
    return files


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
