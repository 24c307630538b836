"""Files of single lanes of a sweep: what `output.lanes`, `output.perf_data` and `output.timeline` ask for.

`output.lanes=[0]` means replicate 0 of every configuration that a job asked for; `[bare_metal:0]` that of every
configuration of the policy, baselines included. Of a configuration with several seeds it is the first seed. Each
configuration has a folder of its own below `lanes`, and its files are artifacts of its run in MLflow.

A sweep keeps rows, not lanes, and its rows may come from other machines or from the store. So a lane is run once more
here, with its log on, and its counts must be those of its row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spepolicy.lab import output
from spepolicy.lab.chosen_lanes import write_lane
from spepolicy.lab.run import CHOSEN
from spepolicy.lab.sweep.work import judged

if TYPE_CHECKING:
    from spepolicy.drivers.result import LaneLog
    from spepolicy.lab.sweep.collect import Collector
    from spepolicy.lab.sweep.jobs import Configuration
    from spepolicy.lane_choice import ChosenLanes

__all__ = ["write_lane_files"]


def write_lane_files(
    wanted: ChosenLanes, configuration: Configuration, collector: Collector, sweep: Path, say: Callable[[str], None]
) -> list[Path]:
    """Write what is *wanted* of the lanes of *configuration* that are there; return the files.

    Raises `OutputError` if the folder of the *sweep* cannot be written.
    """
    name = configuration.policy.name
    replicates = [
        number
        for policy, number in wanted.lanes
        if (policy == name or (not policy and configuration.role == CHOSEN)) and wanted.any()
    ]
    files: list[Path] = []
    seed = next(iter(configuration.lanes))
    for replicate in dict.fromkeys(replicates):
        row = collector.row(configuration.key, seed, replicate)
        if row is None:
            continue  # an interruption or a failure left it out
        say(f"replicate {replicate} of {configuration.label()}, seed {seed}: running its lane again with a log")
        log = _recorded(configuration, seed, replicate, row)
        folder = output.open_folder(sweep / "lanes" / _folder_name(configuration))
        files += write_lane(wanted, log, folder, name, replicate)
    return list(dict.fromkeys(files))


def _recorded(configuration: Configuration, seed: int, replicate: int, row: dict[str, np.generic]) -> LaneLog:
    from spepolicy.drivers.simulate import record_lane

    scenario = dataclasses.replace(configuration.scenario, seed=seed)
    policy = configuration.policy.build()
    log = record_lane(scenario, policy, name=configuration.policy.name, replicate=replicate)
    again = judged(log.result)
    counts = [name for name, value in row.items() if isinstance(value, np.integer) and name in again]
    different = [name for name in counts if int(again[name][0]) != int(row[name])]
    if different or not counts:
        raise AssertionError(
            f"replicate {replicate} of {configuration.label()} was not the same again in {', '.join(different)}: this "
            "is a bug in spepolicy, or the row in the store is of other code"
        )
    return log


def _folder_name(configuration: Configuration) -> str:
    """Return a name that says which configuration it is, and is its own."""
    return f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', configuration.label())[:80]}-{configuration.key[:8]}"
