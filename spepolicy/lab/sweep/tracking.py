"""A sweep in MLflow: one flat run a configuration, and one that sums the sweep up.

Runs are written while the simulation goes on, by a thread that hands them to MLflow's process. No nesting: MLflow's
table folds nested runs away, and its charts then leave them out. What goes wrong here never reaches the rows, which are
in the store by then; it is told at the end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spepolicy.errors import OutputError
from spepolicy.judge.blackout import CAUSES
from spepolicy.judge.errata_page import errata_as_markdown
from spepolicy.lab import output
from spepolicy.lab.sweep.identity import digest, provenance
from spepolicy.lab.tracking import RunRecord, Tracked, Tracker, TrackingSettings

if TYPE_CHECKING:
    from spepolicy.lab.sweep.collect import Outcome
    from spepolicy.lab.sweep.run import SweepPlan, SweepSummary

__all__ = ["TRACKED_METRICS", "Recorder"]

# Of the hundred metrics of a row, those that configurations are compared by; the others are in configurations.csv.
TRACKED_METRICS = (
    "excess_blackout_pct", "blackout_pct", "unseen_samples_pct", "missed_samples_pct", "lost_samples_pct",
    "discarded_samples_pct", "stolen_pct", "pinned_peak_MiB", "pinned_mean_MiB", "memlock_peak_pct",
    "stage2_faults_per_s", "data_loss_per_s", "longest_blackout_us", "windows_per_s", "fidelity_tv_excess",
    "attribution_accuracy_pct", "diverged_records", "startup_ms",
)  # fmt: skip
WITH_INTERVAL = ("excess_blackout_pct", "unseen_samples_pct", "stolen_pct")
BATCH = 100  # runs handed over at once


class Recorder:
    """Writes the runs of a sweep in a thread of its own."""

    def __init__(self, plan: SweepPlan, settings: TrackingSettings) -> None:
        """Raises `OutputError` at once for a store that cannot be one."""
        self.error = ""
        self.seconds = 0.0  # that MLflow took
        self.written = 0
        self._plan = plan
        self._start_ms = int(time.time() * 1000)
        self._workloads: dict[int, tuple[Any, dict[str, str | None]]] = {}
        self._tracker = Tracker(settings)
        self._tracked: Tracked | None = None
        self._queue: queue.Queue[RunRecord | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, outcome: Outcome, complete: bool = True, files: Sequence[Path] = ()) -> None:
        """Have the run of one configuration written, with *files* as further artifacts."""
        if not self.error:
            self._queue.put(self._record(outcome, complete, files))

    def finish(self, summary: SweepSummary) -> Tracked | None:
        """Write the summary run and wait until all is written; return where, or None if it failed (see `error`)."""
        if not self.error:
            self._queue.put(self._summary_record(summary))
        self._queue.put(None)
        self._thread.join()
        return None if self.error or self._tracked is None else replace(self._tracked, sweep=self._plan.name())

    def _work(self) -> None:
        try:
            with self._tracker:
                self._tracker.wait_until_ready()
                ended = False
                while not ended:
                    records = [self._queue.get()]
                    while len(records) < BATCH and not self._queue.empty():
                        records.append(self._queue.get())
                    ended = None in records
                    runs = [record for record in records if record is not None]
                    begin = time.perf_counter()
                    if runs:
                        self._tracked = self._tracker.write(runs)
                        self.written += len(runs)
                        self.seconds += time.perf_counter() - begin
        except OutputError as error:
            done = f"{self.written:,} runs were recorded before" if self.written else "No run was recorded"
            self.error = f"{error} {done}. No result is lost: all rows are in the store '{self._plan.store}'."

    # ---- records -----------------------------------------------------------------------------------------------------

    def _tags(self, kind: str) -> dict[str, str]:
        return {
            "sweep": self._plan.name(),
            "kind": kind,
            "spepolicy_version": provenance()["spepolicy"],
            "mlflow.source.name": "spepolicy",
            "mlflow.source.type": "LOCAL",
        }

    def _record(self, outcome: Outcome, complete: bool, files: Sequence[Path] = ()) -> RunRecord:
        configuration = outcome.configuration
        metrics = {name: outcome.values[name] for name in TRACKED_METRICS if name in outcome.values}
        metrics |= {f"ci95/{name}": outcome.ci95[name] for name in WITH_INTERVAL if name in outcome.ci95}
        for cause in CAUSES:
            if value := outcome.values.get(f"blackout_{cause}_ms_per_s", 0.0):
                metrics[f"blackout_by_cause/{cause}_ms_per_s"] = value
        metrics["errata_found"] = sum(erratum.count > 0 for erratum in outcome.errata)
        metrics["lanes"] = len(outcome.seed)
        width_ms = configuration.scenario.duration_ps / 1e9 / len(outcome.series)
        series = [
            ("blackout_over_time_ms_per_s", round(bin_ * width_ms * 1e3), float(value))  # step: us of guest time
            for bin_, value in enumerate(outcome.series)
        ]
        return RunRecord(
            name=outcome.label()[:250],
            tags=self._tags("configuration")
            | {"policy": configuration.policy.name, "role": configuration.role, "config_hash": configuration.key},
            params={"policy": configuration.policy.name, **configuration.params},
            metrics={name: float(value) for name, value in metrics.items()},
            series=series,
            files=[*self._errata_page(outcome), *map(str, files)],
            dataset=self._workload(configuration.scenario.workload),
            status="FINISHED" if complete else "KILLED",
            start_ms=self._start_ms,
            end_ms=int(time.time() * 1000),
        )

    def _errata_page(self, outcome: Outcome) -> list[str]:
        """Write the page of what was found; nothing found, no page."""
        if not any(erratum.count for erratum in outcome.errata):
            return []
        folder = self._plan.folder / "errata" / outcome.configuration.key
        folder.mkdir(parents=True, exist_ok=True)
        page = errata_as_markdown(outcome.findings, outcome.errata)
        return [str(output.write_text(folder / output.ERRATA_PAGE, page))]

    def _workload(self, workload: Any) -> dict[str, str | None]:
        """Describe the program as the dataset that a run's profile is of."""
        if id(workload) not in self._workloads:
            described: dict[str, str | None] = {
                "name": (workload.source or "workload").split(".")[0][:60],
                "digest": digest(workload).hex()[:8],
                "source_type": "code",
                "source": '{"tags": {"mlflow.source.name": "spepolicy", "mlflow.source.type": "LOCAL"}}',
                "schema": None,
                "profile": f'{{"functions": {len(workload.function_names)}, "phases": {len(workload.phase_ps)}}}',
                "context": "workload",
            }
            self._workloads[id(workload)] = (workload, described)
        return self._workloads[id(workload)][1]

    def _summary_record(self, summary: SweepSummary) -> RunRecord:
        numbers = {
            "configurations": len(summary.outcomes),
            "lanes": summary.lanes,
            "lanes_computed": summary.computed,
            "jobs_failed": len(summary.failures),
            "simulate_s": summary.simulate_s,
        }
        return RunRecord(
            name=f"summary of {summary.plan.name()}",
            tags=self._tags("summary") | {"mlflow.note.content": f"```\n{summary.text()}\n```"[:8000]},
            params={},
            metrics={name: float(value) for name, value in numbers.items()},
            series=[],
            files=[str(path) for path in summary.files.values()],
            status="KILLED" if summary.interrupted else "FINISHED",
            start_ms=self._start_ms,
            end_ms=int(time.time() * 1000),
        )
