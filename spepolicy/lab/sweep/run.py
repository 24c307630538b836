"""One sweep: list, take what is stored, simulate the rest, store, sum up, write, track.

Rows are stored as they come, and everything else is made from rows: whatever happens later, what was computed is there.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.judge.tables import Categories
from spepolicy.lab import output
from spepolicy.lab.sweep.collect import Collector, Outcome
from spepolicy.lab.sweep.identity import digest, lane_hash, provenance, source_hash
from spepolicy.lab.sweep.jobs import Configuration, Failure, Job, configurations_of, lanes_of
from spepolicy.lab.sweep.lane_files import write_lane_files
from spepolicy.lab.sweep.listing import Estimate, estimate, listing
from spepolicy.lab.sweep.progress import Progress
from spepolicy.lab.sweep.sensitivity import SENSITIVITY, Sensitivity, Verdict, cost_names
from spepolicy.lab.sweep.statistics import Paired, differences, half_widths, pareto_front
from spepolicy.lab.sweep.store import Store, now_utc
from spepolicy.lab.sweep.tracking import Recorder
from spepolicy.lab.sweep.work import Part, Rows, Task
from spepolicy.lab.tracking import Tracked, TrackingSettings, without_password
from spepolicy.lane_choice import NO_LANES, ChosenLanes
from spepolicy.policy_choice import BARE_METAL

if TYPE_CHECKING:
    from spepolicy.lab.sweep.engines import Engine

__all__ = ["SweepPlan", "SweepSummary", "execute_sweep"]

STORE_EVERY_S = 1.0  # rows wait so long at most before they are on the disk


@dataclass(frozen=True)
class Stop:
    """When there are enough replicates."""

    precision: float | None = None  # half-width of a 95 % interval; None: after the configured number
    metric: str = "excess_blackout_pct"
    maximum: int = 256  # replicates of a seed


@dataclass(frozen=True)
class SweepPlan:
    """Everything that a sweep needs, checked. All jobs agree in what belongs to the sweep."""

    jobs: list[Job]
    failures: list[Failure]  # jobs that could not be composed
    folder: Path  # of this sweep: tables, figures, report
    store: Path
    resume: bool
    tracking: TrackingSettings
    stop: Stop
    sensitivity: tuple[str, ...] = ()  # cost constants to be moved
    lanes: ChosenLanes = NO_LANES  # files of single lanes
    notes: tuple[str, ...] = ()

    def name(self) -> str:
        """Return what the sweep is called where it is one among others."""
        return "/".join(self.folder.parts[-2:])


@dataclass
class SweepSummary:
    """What a sweep found and where it is: the one object that tables, reports and tracking are made from."""

    plan: SweepPlan
    configurations: dict[str, Configuration]  # by key
    outcomes: dict[str, Outcome]  # by key; configurations of which any lane is there
    failures: list[Failure]  # by job: composing or simulating it failed
    lanes: int  # wanted
    computed: int  # of these, in this sweep; the others were in the store
    seconds: float  # wall time, of which
    compose_s: float  # composing and checking jobs, before
    simulate_s: float
    interrupted: bool
    workers: str
    notes: list[str]
    differences: list[Paired]  # of every two policies on one scenario
    pareto: set[str]  # configurations that no other on their scenario beats
    verdicts: list[Verdict]  # of the sensitivity analysis: a conclusion and a cost constant each
    files: dict[str, Path] = field(default_factory=dict)  # by file name
    tracked: Tracked | None = None
    tracking_error: str = ""
    tracking_s: float = 0.0  # of which most passed while lanes ran

    def text(self) -> str:
        """Return the summary for the terminal."""
        from spepolicy.lab.sweep.summary import summarize

        return summarize(self)


Say = Callable[[str], None]


def execute_sweep(plan: SweepPlan, engine: Engine, say: Say, compose_s: float = 0.0) -> SweepSummary:
    """Run *plan* on *engine* and return the summary; *say* is told what is being done.

    Raises `OutputError` (`StoreError`) if the folder or the store cannot be written, `WorkerError` if workers die. A
    job that fails is in `SweepSummary.failures`. On Ctrl-C the lanes that have finished are summed up, and
    `SweepSummary.interrupted` is True.
    """
    folder = output.open_folder(plan.folder)
    plan = dataclasses.replace(plan, folder=folder)
    with Store(plan.store) as store:
        recorder = Recorder(plan, plan.tracking) if plan.tracking.kind != "none" else None
        return _Sweep(plan, engine, store, recorder, say).run(compose_s)


class _Sweep:
    """A sweep under way."""

    def __init__(self, plan: SweepPlan, engine: Engine, store: Store, recorder: Recorder | None, say: Say) -> None:
        self.plan, self.engine, self.store, self.recorder, self.say = plan, engine, store, recorder, say
        self.configurations = configurations_of(plan.jobs) if plan.jobs else {}
        self.collector = Collector(self.configurations)
        self.failed: dict[str, str] = {}  # configuration key -> why lanes of it failed
        self.failed_lanes = 0
        self.computed = 0
        self.interrupted = False
        self.waiting: list[dict[str, Any]] = []  # rows that are not stored yet
        self.stored_at = time.monotonic()
        self.texts: dict[str, str] = {}  # configuration key -> JSON
        self.recorded: set[str] = set()  # configurations handed to the recorder
        self.lane_files: dict[str, list[Path]] = {}  # of single lanes, by configuration key
        self.have: set[str] = set()  # lanes (their hashes) that are there, or that failed
        self.sensitivity = Sensitivity(plan.sensitivity, self.configurations.values()) if plan.sensitivity else None

    def run(self, compose_s: float) -> SweepSummary:
        """Do it all."""
        from spepolicy.drivers.compiling import compile_machine

        begin = time.perf_counter()
        todo = self._missing()
        if todo:
            compile_machine(self.say)
        expected = self._tell(todo)
        simulated = time.perf_counter()
        try:
            while todo:
                self._simulate(todo, expected)
                todo = self._next_round()
        except KeyboardInterrupt:
            self.interrupted = True
            self.say("interrupted; what has finished is kept")
        finally:
            self._store_rows()
        return self._summary(begin, simulated, compose_s)

    # ---- planning ----------------------------------------------------------------------------------------------------

    def _missing(self) -> list[tuple[Configuration, list[tuple[Any, list[int]]]]]:
        """Return what is to be computed: configuration -> [(scenario, replicates)]. What is stored is taken from there
        if the sweep resumes.
        """
        todo = []
        stored: dict[str, str] = {}  # lane hash -> configuration key
        for configuration in self.configurations.values():
            needed = []
            for scenario, replicates in lanes_of(configuration):
                hashes = [lane_hash(configuration.key, scenario.seed, replicate) for replicate in replicates]
                there = {h for h in hashes if self.plan.resume and h in self.store} - self.have
                stored |= dict.fromkeys(there, configuration.key)
                self.have |= there
                rest = [replicate for replicate, h in zip(replicates, hashes, strict=True) if h not in self.have]
                if rest:
                    needed.append((scenario, rest))
            if needed:
                todo.append((configuration, needed))
        self._take_stored(stored)
        return todo

    def _next_round(self) -> Any:
        """Return what is still to be computed: more replicates where intervals are wide, then the sensitivity."""
        self._store_rows()
        if self._widen():
            return self._missing()
        while self.sensitivity is not None:
            more = self.sensitivity.next_round(self._outcomes())
            if not more:
                break
            self.configurations |= more
            self.collector.extend(more)
            if todo := self._missing():
                self.say(f"sensitivity: {len(more):,} configurations with a cost constant moved")
                return todo
        return []

    def _widen(self) -> bool:
        """Double the replicates of what is not known precisely enough; return whether there is any."""
        stop = self.plan.stop
        if stop.precision is None:
            return False
        chosen = self._outcomes(SENSITIVITY)
        wide = {key for key, half in half_widths(chosen.values(), stop.metric).items() if half > stop.precision}
        scenarios = {self.configurations[key].scenario_key for key in wide}
        grown = 0
        for configuration in self.configurations.values():
            beside = configuration.policy.name == BARE_METAL and configuration.scenario_key in scenarios
            if not (configuration.key in wide or beside) or configuration.role == SENSITIVITY:
                continue
            for seed, replicates in configuration.lanes.items():
                more = min(2 * replicates, stop.maximum)
                grown += max(0, more - replicates)
                configuration.lanes[seed] = max(more, replicates)
        if grown:
            self.say(f"{len(wide):,} intervals of {stop.metric} wider than +- {stop.precision:g}: {grown:,} more lanes")
        return grown > 0

    def _outcomes(self, without: str = "") -> dict[str, Outcome]:
        return self.collector.outcomes(key for key, c in self.configurations.items() if c.role != without)

    def _take_stored(self, stored: dict[str, str]) -> None:
        for table in self.store.read(list(stored)):
            columns = {name: _as_numpy(table[name]) for name in table.column_names if name not in _TEXT_COLUMNS}
            keys = np.array([stored[h] for h in table["lane_hash"].to_pylist()])
            for key in np.unique(keys).tolist():
                self.collector.add(key, columns, np.flatnonzero(keys == key))

    def _tell(self, todo: Sequence[tuple[Configuration, list[tuple[Any, list[int]]]]]) -> Estimate:
        workers = self.engine.workers()
        missing = dict.fromkeys(self.configurations, 0)
        missing |= {c.key: sum(len(replicates) for _, replicates in needed) for c, needed in todo}
        expected = estimate([configuration for configuration, _ in todo], missing, workers)
        lanes = sum(configuration.size() for configuration in self.configurations.values())
        task_lanes = expected.task_lanes(max(1, sum(missing.values())), workers)
        listed = listing(
            list(self.configurations.values()),
            len(self.plan.jobs),
            lanes - sum(missing.values()),
            expected,
            workers,
            task_lanes,
        )
        self.say(f"{listed}, on {self.engine.describe()}")
        return expected

    def _tasks(
        self, todo: Sequence[tuple[Configuration, list[tuple[Any, list[int]]]]], expected: Estimate
    ) -> list[Task]:
        """Cut what is to be computed into tasks: lanes of one policy that can share a kernel call."""
        from spepolicy.drivers.simulate import Piece, chunks_of

        lanes = sum(len(replicates) for _, needed in todo for _, replicates in needed)
        size = expected.task_lanes(lanes, self.engine.workers())
        by_policy: dict[Any, list[tuple[Configuration, Piece]]] = {}
        for configuration, needed in todo:
            pieces = by_policy.setdefault(configuration.policy, [])
            pieces += [(configuration, Piece(scenario, np.array(replicates))) for scenario, replicates in needed]
        tasks: list[Task] = []
        for policy, pieces in by_policy.items():
            owner = {id(piece.scenario): configuration.key for configuration, piece in pieces}
            for chunk in chunks_of([piece for _, piece in pieces], size):
                parts = tuple(Part(owner[id(p.scenario)], p.scenario, tuple(p.replicates.tolist())) for p in chunk)
                tasks.append(Task(0, policy, parts, source_hash(), policy.plugin()))
        order = {key: n for n, key in enumerate(self.configurations)}
        tasks.sort(key=lambda task: order[task.parts[0].configuration])
        return [dataclasses.replace(task, number=n) for n, task in enumerate(tasks)]

    # ---- computing ---------------------------------------------------------------------------------------------------

    def _simulate(self, todo: Any, expected: Estimate) -> None:
        tasks = self._tasks(todo, expected)
        with Progress(sum(task.lanes() for task in tasks)) as progress:
            for rows in self.engine.run(tasks):
                if rows is not None:
                    self._take(rows)
                    progress.advance(rows.task.lanes(), self.failed_lanes)
                if time.monotonic() - self.stored_at > STORE_EVERY_S:
                    self._store_rows()

    def _take(self, rows: Rows) -> None:
        """Collect the rows of a task, and keep them to be stored."""
        for part, reason in rows.failed:
            self.failed.setdefault(part.configuration, reason)
            self.failed_lanes += len(part.replicates)
            self.have |= {lane_hash(part.configuration, part.scenario.seed, each) for each in part.replicates}
            self.collector.add_lost(part.configuration, len(part.replicates))
        if not rows.parts:
            return
        columns: dict[str, Any] = self._identified(rows)
        first = 0
        for part in rows.parts:
            end = first + len(part.replicates)
            self.collector.add(part.configuration, columns, slice(first, end))
            first = end
        self.computed += first
        self.have.update(columns["lane_hash"])
        self.waiting.append(columns)
        self._record({self.configurations[part.configuration].scenario_key for part in rows.parts})

    def _record(self, scenarios: set[str], whole: bool = False) -> None:
        """Hand every configuration of *scenarios* that has become complete to tracking; with *whole*, any that is left.

        What fails here costs no row: it is told at the end.
        """
        if self.recorder is None or self.recorder.error:
            return
        if (self.plan.stop.precision is not None or self.plan.lanes.any()) and not whole:
            return  # its replicates, or the files of its lanes, are not all there before the end
        for key, configuration in self.configurations.items():
            if key in self.recorded or configuration.scenario_key not in scenarios or configuration.role == SENSITIVITY:
                continue
            complete = self.collector.is_complete(key)
            if self.collector.count(key) and (complete or whole):
                self.recorded.add(key)
                self.recorder.add(self.collector.outcome(key), complete, self.lane_files.get(key, ()))

    def _identified(self, rows: Rows) -> dict[str, Any]:
        """Return the columns of the store for *rows*: what identifies them, the numbers, where they come from."""
        counts = [len(part.replicates) for part in rows.parts]
        mine = [self.configurations[part.configuration] for part in rows.parts]
        pairs = zip(rows.columns["seed"].tolist(), rows.columns["replicate"].tolist(), strict=True)
        keys = [c.key for c, count in zip(mine, counts, strict=True) for _ in range(count)]
        texts: dict[str, list[str]] = {
            "config_hash": [c.key for c in mine],
            "scenario_hash": [c.scenario_key for c in mine],
            "policy": [c.policy.name for c in mine],
            "policy_fields": [c.policy.fields for c in mine],
            "config": [self._config_text(c) for c in mine],
        }
        here = provenance() | {"plugin": rows.task.plugin, "written_utc": now_utc()}
        where = {name: [here[name]] * len(mine) for name in _PROVENANCE}
        numbers = {name: column for name, column in rows.columns.items() if name not in ("seed", "replicate")}
        return {
            "lane_hash": [lane_hash(key, seed, replicate) for key, (seed, replicate) in zip(keys, pairs, strict=True)],
            **{name: _repeated(values, counts) for name, values in texts.items()},
            "seed": rows.columns["seed"],
            "replicate": rows.columns["replicate"],
            **numbers,
            **{name: _repeated(values, counts) for name, values in where.items()},
        }

    def _config_text(self, configuration: Configuration) -> str:
        if configuration.key not in self.texts:
            shown = {key: value for key, value in configuration.config.items() if key not in _NOT_IN_CONFIG}
            workload = configuration.scenario.workload
            shown["workload"] = {"source": workload.source, "hash": digest(workload).hex()[:12]}
            shown["policy"] = {"name": configuration.policy.name, **json.loads(configuration.policy.fields)}
            self.texts[configuration.key] = json.dumps(shown, default=str)
        return self.texts[configuration.key]

    def _store_rows(self) -> None:
        """Put the rows that wait into the store, as one file."""
        waiting, self.waiting = self.waiting, []
        if waiting:
            self.store.append({name: _joined([columns[name] for columns in waiting]) for name in waiting[0]})
        self.stored_at = time.monotonic()

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _summary(self, begin: float, simulated: float, compose_s: float) -> SweepSummary:
        from spepolicy.lab.sweep.artifacts import write_artifacts

        simulate_s = time.perf_counter() - simulated
        outcomes = self._outcomes(SENSITIVITY)
        summary = SweepSummary(
            plan=self.plan,
            configurations=self.configurations,
            outcomes=outcomes,
            failures=[*self.plan.failures, *self._failed_jobs()],
            lanes=sum(configuration.size() for configuration in self.configurations.values()),
            computed=self.computed,
            seconds=0.0,
            compose_s=compose_s,
            simulate_s=simulate_s,
            interrupted=self.interrupted,
            workers=self.engine.describe(),
            notes=[*self.plan.notes, *self.collector.notes],
            differences=differences(outcomes.values()),
            pareto=pareto_front(outcomes.values()),
            verdicts=self.sensitivity.verdicts(self._outcomes()) if self.sensitivity else [],
        )
        self._write_lanes()
        summary.files |= write_artifacts(summary)
        summary.seconds = time.perf_counter() - begin + compose_s
        if self.recorder is not None:
            self._record({configuration.scenario_key for configuration in self.configurations.values()}, whole=True)
            summary.tracked = self.recorder.finish(summary)
            summary.tracking_error, summary.tracking_s = self.recorder.error, self.recorder.seconds
            summary.seconds = time.perf_counter() - begin + compose_s
            self._say_where(summary)
        return summary

    def _write_lanes(self) -> None:
        for key, configuration in self.configurations.items():
            if self.plan.lanes.any() and configuration.role != SENSITIVITY:
                files = write_lane_files(self.plan.lanes, configuration, self.collector, self.plan.folder, self.say)
                self.lane_files[key] = files
        if count := sum(map(len, self.lane_files.values())):
            self.say(f"{count:,} files of single lanes are in {self.plan.folder / 'lanes'}")

    def _say_where(self, summary: SweepSummary) -> None:
        """Write what became of tracking: the one file that cannot be tracked itself."""
        tracked = summary.tracked
        content = {
            "uri": without_password(tracked.uri) if tracked else "",
            "link": tracked.link() if tracked else "",
            "error": summary.tracking_error,
            "tracking_s": round(summary.tracking_s, 3),
            "seconds": round(summary.seconds, 3),
        }
        path = output.write_json(self.plan.folder / "tracking.json", content)
        summary.files[path.name] = path

    def _failed_jobs(self) -> Iterable[Failure]:
        """Name every job whose lanes, or whose baseline's lanes, failed."""
        for job in self.plan.jobs:
            for key, reason in self.failed.items():
                configuration = self.configurations[key]
                if job.number in configuration.jobs:
                    whose = "" if configuration.role == "chosen" else f"its baseline {configuration.policy.name}: "
                    yield Failure(job.number, job.overrides, f"{whose}{reason}")
                    break


_PROVENANCE = ("spepolicy", "source", "plugin", "commit", "dirty", "versions", "machine", "written_utc")
_TEXT_COLUMNS = ("lane_hash", "config_hash", "scenario_hash", "policy", "policy_fields", "config", *_PROVENANCE)
_NOT_IN_CONFIG = ("policy", "tracking", "output", "threads", "sweep", "stop", "seed", "replicates", "baselines")


def _repeated(values: Sequence[str], counts: Sequence[int]) -> Categories:
    """Return a column in which each of *values* fills so many rows."""
    names = {name: n for n, name in enumerate(dict.fromkeys(values))}
    codes = np.repeat(np.array([names[value] for value in values], dtype=np.int32), counts)
    return Categories(codes, tuple(names))


def _joined(parts: Sequence[Any]) -> Any:
    """Put columns of one kind one below the other."""
    if isinstance(parts[0], Categories):
        return output.stacked([{"it": part} for part in parts])["it"]
    if isinstance(parts[0], list):
        return [item for part in parts for item in part]
    return np.concatenate(parts)


def _as_numpy(column: Any) -> Any:
    """Return a column of a stored table as the tasks give it: [rows], or [rows, bins] for a list."""
    import pyarrow

    whole = column.combine_chunks()
    if pyarrow.types.is_list(whole.type):
        flat = whole.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(whole), -1)
    return whole.to_numpy(zero_copy_only=False)


def plan_sweep(jobs: list[Job], failures: list[Failure], folder: Path) -> SweepPlan:
    """Return the plan of *jobs*. Raises `ConfigurationError` where they disagree on what belongs to the whole sweep."""
    from spepolicy.check import checked
    from spepolicy.config import plain
    from spepolicy.host_choice import host_notes
    from spepolicy.judge.metrics import METRICS
    from spepolicy.lab.sweep.jobs import one_for_all
    from spepolicy.schema import StopSettings, settings_of

    if not jobs:
        return SweepPlan([], failures, folder, folder / "store", False, TrackingSettings("none"), Stop())
    one_for_all(jobs)
    config = jobs[0].config
    settings, stop = config["sweep"], config["stop"]
    root = settings_of(StopSettings)
    if stop["metric"] not in METRICS:
        raise ConfigurationError(
            f"stop.metric={stop['metric']}: no such metric. All are in spepolicy/judge/metrics.py."
            f"{nearest(str(stop['metric']), METRICS)}"
        )
    precision = stop["precision"]
    notes = dict.fromkeys(note for job in jobs for note in host_notes(plain(job.config)["host"], job.scenario))
    return SweepPlan(
        jobs=jobs,
        failures=failures,
        folder=folder,
        store=Path(settings["store"] or Path(config["output"]["dir"]) / "store").expanduser(),
        resume=bool(settings["resume"]),
        tracking=TrackingSettings(**jobs[0].options.tracking),
        stop=Stop(
            None if precision is None else float(checked(precision, root["precision"], "stop.precision")),
            stop["metric"],
            int(checked(stop["maximum"], root["maximum"], "stop.maximum")),
        ),
        sensitivity=tuple(cost_names(settings["sensitivity"])),
        lanes=jobs[0].options.lanes,
        notes=tuple(notes),
    )
