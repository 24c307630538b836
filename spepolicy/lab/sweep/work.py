"""The unit of work of a sweep: some lanes of one policy, simulated side by side and judged, as columns of numbers.

`run_task` is a function of plain data that runs the same in a thread, in a process, or on another machine. It depends
on nothing but its argument and the installed code, and it says so if that is not the code that the sweep was planned
with.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import PluginError, SpePolicyError
from spepolicy.lab.sweep.identity import PolicyChoice, source_hash
from spepolicy.machine.scenario import Scenario

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result
    from spepolicy.drivers.simulate import Machines, Piece, Runner

__all__ = ["SERIES_BINS", "Part", "Rows", "Task", "judged", "run_task", "start_tasks", "stop_tasks"]

SERIES_BINS = 60  # of blackout over time; MLflow's charts stay quick up to 100
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """Lanes of one scenario, for one configuration of the sweep."""

    configuration: str  # key
    scenario: Scenario
    replicates: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Lanes of one policy that share a kernel call."""

    number: int
    policy: PolicyChoice
    parts: tuple[Part, ...]
    source: str  # source_hash() of the planning process
    plugin: str  # PolicyChoice.plugin() there

    def lanes(self) -> int:
        """Return how many lanes it has."""
        return sum(len(part.replicates) for part in self.parts)


@dataclass
class Rows:
    """What became of a task: a row a lane, part after part. Parts that failed have no rows."""

    task: Task
    seconds: float  # wall time where it ran
    parts: list[Part] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)  # by name; those of spepolicy.judge.tables.lane_table and more
    failed: list[tuple[Part, str]] = field(default_factory=list)  # with the reason
    unfinished: int = 0  # lanes that an interruption stopped
    where: str = ""  # name of the worker


_local = threading.local()
_runners: dict[PolicyChoice, Runner] = {}
_runners_lock = threading.Lock()
_stopping = threading.Event()


def stop_tasks() -> None:
    """Let the tasks of this process end at once; their unfinished lanes give no rows."""
    _stopping.set()
    for runner in list(_runners.values()):
        runner.stopping = True


def start_tasks() -> None:
    """Let tasks of this process run again after `stop_tasks`."""
    _stopping.clear()
    for runner in list(_runners.values()):
        runner.stopping = False


def run_task(task: Task, where: str = "") -> Rows:
    """Simulate and judge the lanes of *task*.

    A part whose policy or scenario makes an error is told in `Rows.failed`, and the other parts keep their rows. So is
    all of the task if the code that is installed here is not the code of the sweep. *where*: names the worker.
    """
    begin = time.perf_counter()
    rows = Rows(task, 0.0, where=where)
    try:
        runner = _runner(task)
    except SpePolicyError as error:
        rows.failed = [(part, f"{where}: {error}" if where else str(error)) for part in task.parts]
        return rows
    tables: list[Columns] = []
    for parts in _tried_together(task, runner, rows):
        for part, result in parts:
            if result.finished.all():
                rows.parts.append(part)
                tables.append(judged(result))
            else:
                rows.unfinished += len(result.finished)
    if tables:
        rows.columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    rows.seconds = time.perf_counter() - begin
    return rows


def _runner(task: Task) -> Runner:
    from spepolicy.drivers.simulate import Runner

    with _runners_lock:
        if task.policy not in _runners:
            if task.source != source_hash():
                raise PluginError(
                    f"this worker's spepolicy (source {source_hash()}) is not the sweep's (source {task.source}). Rows "
                    "of different code must not be mixed. Install the same version on every worker and start them anew."
                )
            policy = task.policy.build()
            if task.plugin != task.policy.plugin():
                raise PluginError(
                    f"policy '{task.policy.name}' is another one on this worker: {task.policy.plugin()}, the sweep has "
                    f"{task.plugin}. Install the same plugin on every worker and start them anew."
                )
            _runners[task.policy] = Runner(policy, task.policy.name)
            _runners[task.policy].stopping = _stopping.is_set()
        return _runners[task.policy]


def _machines() -> Machines:
    from spepolicy.drivers.simulate import Machines

    if not hasattr(_local, "machines"):
        _local.machines = Machines()
    machines: Machines = _local.machines
    return machines


def _tried_together(task: Task, runner: Runner, rows: Rows) -> list[list[tuple[Part, Result]]]:
    """Run all parts at once; if that fails, each on its own, so that an error is its own part's only."""
    try:
        return [_simulated(runner, task.parts)]
    except Exception as error:
        if len(task.parts) == 1:
            rows.failed.append((task.parts[0], _reason(error)))
            return []
    done = []
    for part in task.parts:
        try:
            done.append(_simulated(runner, (part,)))
        except Exception as error:
            rows.failed.append((part, _reason(error)))
    return done


def _reason(error: Exception) -> str:
    """Return the message of an error that has one for the user; of a bug, where it is, too."""
    if isinstance(error, SpePolicyError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def _simulated(runner: Runner, parts: Sequence[Part]) -> list[tuple[Part, Result]]:
    from spepolicy.drivers.simulate import Piece
    from spepolicy.judge.records import check_conservation, check_profile, check_time

    pieces: list[Piece] = [Piece(part.scenario, np.array(part.replicates, dtype=np.int64)) for part in parts]
    results = runner.run(pieces, _machines())
    for result in results:
        check_conservation(result)
        check_profile(result)
        check_time(result)
    return list(zip(parts, results, strict=True))


# ---- judging ---------------------------------------------------------------------------------------------------------


def judged(result: Result) -> Columns:
    """Return the columns of the lanes of *result*: exact counts, metrics, observations, and blackout over time.

    What compares a lane with another (excess over bare metal) is left to whoever has both.
    """
    from spepolicy.judge.blackout import lane_series
    from spepolicy.judge.findings import OBSERVATIONS
    from spepolicy.judge.metrics import measure
    from spepolicy.judge.tables import lane_table

    table = lane_table(result, measure(result, None))
    columns = {name: np.asarray(column) for name, column in table.items() if name not in _TOLD_APART}
    for name, (count, _) in OBSERVATIONS.items():
        counts = count(result)
        columns[f"observed_{name}"] = (counts.sum(axis=1) if counts.ndim == 2 else counts).astype(np.int64)
    columns["seed"] = np.full(len(result.replicates), result.scenario.seed, dtype=np.int64)
    columns["blackout_over_time_ms_per_s"] = lane_series(result, SERIES_BINS).astype(np.float32)
    return columns


_TOLD_APART = ("policy", "excess_blackout_pct")
