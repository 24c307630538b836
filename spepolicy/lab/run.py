"""One run: simulate the chosen policy and its baselines, judge, write the run folder, track."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spepolicy.judge.errata import Erratum, Findings, errata_as_json, merge_errata
from spepolicy.judge.errata_page import About, errata_as_markdown, errata_as_rst
from spepolicy.lab import output
from spepolicy.lab.chosen_lanes import write_lanes
from spepolicy.lab.tracking import Tracked, Tracker, TrackingSettings, without_password
from spepolicy.lane_choice import NO_LANES, ChosenLanes
from spepolicy.policy_choice import BARE_METAL

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result
    from spepolicy.judge.blackout import BlackoutSeries
    from spepolicy.judge.metrics import Measured
    from spepolicy.machine.scenario import Scenario

__all__ = ["Plan", "Report", "TrackingSettings", "Verdict", "execute"]

CHOSEN, BASELINE = "chosen", "baseline"

_log = logging.getLogger("spepolicy")


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs, checked."""

    chosen: str  # the policy asked for
    policies: dict[str, object]  # instances, the chosen one first, then the baselines; bare_metal is always among them
    scenario: Scenario
    replicates: int  # lanes a policy: replicates 0 .. replicates - 1
    threads: int | None
    run_dir: Path
    tracking: TrackingSettings
    config: dict[str, Any]  # the resolved configuration, plain containers
    notes: tuple[str, ...] = ()  # lines that the summary must state
    lanes: ChosenLanes = NO_LANES  # files of single lanes


@dataclass(frozen=True)
class Verdict:
    """One policy, judged over the replicates that finished."""

    policy: str
    role: str  # CHOSEN or BASELINE
    result: Result
    measured: Measured
    series: BlackoutSeries
    findings: Findings
    errata: list[Erratum]
    about: About | None = None  # what the errata page says of the policy and its machine

    def numbers(self) -> dict[str, float]:
        """Return every metric and the numbers that `_flat_metrics` lists."""
        result = self.result
        seen = [erratum for erratum in self.errata if erratum.count]
        extra: dict[str, float] = {
            "replicates_finished": len(result.replicates),
            "errata_found": len(seen),
            "errata_high": sum(erratum.severity == "high" for erratum in seen),
            "simulation_s": result.seconds,
        }
        if result.seconds > 0:
            extra["simulated_samples_per_s"] = result.samples / result.seconds
        return self.measured.values | extra


@dataclass(frozen=True)
class Report:
    """What a run found and where it is. Plugins get it in `run_finished`: read-only."""

    chosen: str
    scenario: Scenario
    replicates: int
    finished: dict[str, int]  # replicates finished, by policy
    interrupted: bool
    verdicts: dict[str, Verdict]  # policies of which any replicate finished, in the plan's order
    metrics: dict[str, float]  # what metrics.json holds
    errata: list[Erratum]  # of the chosen policy
    files: dict[str, Path]  # by file name
    run_dir: Path
    notes: tuple[str, ...]
    tracked: Tracked | None

    def summary(self) -> str:
        """Return the summary for the terminal."""
        from spepolicy.lab.summary import summarize

        return summarize(self)


def execute(plan: Plan, say: Callable[[str], None]) -> Report:
    """Run *plan* and return the report; *say* is told what is being done.

    Raises `OutputError` if the run folder or the tracking store cannot be written: before the simulation where that can
    be known. On Ctrl-C the replicates that have finished are judged and written, and `Report.interrupted` is True.
    """
    run_dir = output.open_folder(plan.run_dir)
    if plan.tracking.kind == "none":
        report = _execute(plan, run_dir, None, say)
    else:
        with Tracker(plan.tracking) as tracker:
            report = _execute(plan, run_dir, tracker, say)
    _tell_observers(plan, report, say)
    return report


def _execute(plan: Plan, run_dir: Path, tracker: Tracker | None, say: Callable[[str], None]) -> Report:
    start_ms = int(time.time() * 1000)
    results, interrupted = _simulate(plan, tracker, say)
    notes = list(plan.notes)
    verdicts = _judge(plan, results, notes)
    metrics = _flat_metrics(plan.chosen, verdicts)
    report = Report(
        chosen=plan.chosen,
        scenario=plan.scenario,
        replicates=plan.replicates,
        finished={name: int(result.finished.sum()) for name, result in results.items()},
        interrupted=interrupted,
        verdicts=verdicts,
        metrics=metrics,
        errata=verdicts[plan.chosen].errata if plan.chosen in verdicts else [],
        files=_write_files(plan, run_dir, verdicts, metrics) | _write_lanes(plan, run_dir, results, say),
        run_dir=run_dir,
        notes=tuple(notes),
        tracked=None,
    )
    if tracker is None or not verdicts:
        return report
    return dataclasses.replace(report, tracked=_track(plan, report, tracker, start_ms))


# ---- simulate --------------------------------------------------------------------------------------------------------


def _simulate(plan: Plan, tracker: Tracker | None, say: Callable[[str], None]) -> tuple[dict[str, Result], bool]:
    """Simulate every policy; return the results, and whether Ctrl-C cut it short."""
    from spepolicy.drivers.compiling import compile_machine
    from spepolicy.drivers.simulate import simulate
    from spepolicy.judge.records import check_conservation, check_profile, check_time

    results: dict[str, Result] = {}
    try:
        compile_machine(say)
    except KeyboardInterrupt:
        return results, True
    for name, policy in plan.policies.items():
        try:
            say(f"simulating {name}: {plan.replicates} replicates")
            result = simulate(plan.scenario, policy, name=name, replicates=range(plan.replicates), threads=plan.threads)
        except KeyboardInterrupt:
            return results, True
        check_conservation(result)
        check_profile(result)
        check_time(result)
        results[name] = result
        if not result.finished.all():
            return results, True
        if tracker is not None:
            tracker.check()
    return results, False


# ---- judge -----------------------------------------------------------------------------------------------------------


def _judge(plan: Plan, results: Mapping[str, Result], notes: list[str]) -> dict[str, Verdict]:
    """Judge every policy of which any replicate finished; what goes wrong in a plugin becomes a note."""
    from spepolicy.judge.blackout import blackout_series
    from spepolicy.judge.findings import find
    from spepolicy.judge.lanes import finished_lanes
    from spepolicy.judge.metrics import measure
    from spepolicy.lab.about import about
    from spepolicy.plugins import installed_reporters, make_plugin_manager

    whole = {name: finished_lanes(result) for name, result in results.items() if result.finished.any()}
    verdicts = {}
    for name, result in whole.items():
        manager = make_plugin_manager(plan.policies[name], list(installed_reporters().values()))
        findings = find(
            result,
            virtualized=manager.hook.virtualization() is not False,
            hooks=[caller.name for caller in manager.get_hookcallers(plan.policies[name]) or ()],
        )
        documented = errata_from(manager, "errata", notes)
        observed = errata_from(manager, "report_errata", notes, findings=findings)
        verdicts[name] = Verdict(
            policy=name,
            role=CHOSEN if name == plan.chosen else BASELINE,
            result=result,
            measured=measure(result, whole.get(BARE_METAL)),
            series=blackout_series(result),
            findings=findings,
            errata=merge_errata(documented, observed),
            about=about(plan.policies[name], manager, plan.scenario, findings),
        )
    return verdicts


def errata_from(manager: Any, hook: str, notes: list[str], **arguments: Any) -> list[Erratum]:
    """Call *hook* plugin by plugin, so that one that raises loses its own errata only."""
    errata: list[Erratum] = []
    for label, answer in _each_plugin(manager, hook, notes, **arguments):
        if answer is None:
            continue
        if not isinstance(answer, (list, tuple)) or not all(isinstance(erratum, Erratum) for erratum in answer):
            notes.append(f"plugin '{label}': {hook} returned {answer!r:.80}; it must be a list of Erratum. Ignored.")
            continue
        errata += answer
    return errata


def _each_plugin(manager: Any, hook: str, notes: list[str], **arguments: Any) -> list[tuple[str, Any]]:
    """Return (plugin, its answer) for every plugin that implements *hook*. An exception is logged and noted."""
    answers = []
    for impl in getattr(manager.hook, hook).get_hookimpls():
        try:
            answers.append((impl.plugin_name, impl.function(*(arguments[name] for name in impl.argnames))))
        except Exception as error:
            _log.warning("plugin %s: %s raised", impl.plugin_name, hook, exc_info=True)
            what = f"{type(error).__name__}: {error}"
            notes.append(f"plugin '{impl.plugin_name}': {hook} raised {what}. Its part is missing.")
    return answers


def _flat_metrics(chosen: str, verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Return name -> number: the chosen policy's metrics under their own names, a baseline's under "POLICY.name".

    "NAME_ci95" is the half-width of the 95 % confidence interval of NAME. Besides `spepolicy.judge.metrics.METRICS`:
    `replicates_finished`, `errata_found` (errata that occurred), `errata_high` (of these, of high severity),
    `simulation_s` and `simulated_samples_per_s` (wall-clock; the only numbers that differ from machine to machine).
    """
    flat: dict[str, float] = {}
    for name, verdict in verdicts.items():
        prefix = "" if name == chosen else f"{name}."
        flat |= {f"{prefix}{key}": value for key, value in verdict.numbers().items()}
        flat |= {f"{prefix}{key}_ci95": half for key, half in verdict.measured.ci95.items()}
    return flat


# ---- write -----------------------------------------------------------------------------------------------------------


def _write_files(
    plan: Plan, run_dir: Path, verdicts: Mapping[str, Verdict], metrics: dict[str, float]
) -> dict[str, Path]:
    """Write the run folder and return its files by name. Without any finished replicate there is nothing to write."""
    from spepolicy.judge.tables import lane_table, window_table
    from spepolicy.lab.figures import draw_blackout

    if not verdicts:
        return {}
    files = [output.write_json(run_dir / output.METRICS_FILE, metrics)]
    files.append(output.write_json(run_dir / output.CONFIG, _shareable(plan.config)))
    tables = [lane_table(verdict.result, verdict.measured) for verdict in verdicts.values()]
    files.append(output.write_parquet(run_dir / output.LANES, output.stacked(tables)))
    windows = window_table({name: verdict.result for name, verdict in verdicts.items()})
    files.append(output.write_parquet(run_dir / output.BLACKOUTS, windows))
    files += _write_errata(plan.chosen, run_dir, verdicts)
    series = {name: verdict.series for name, verdict in verdicts.items()}
    host = verdicts[next(iter(verdicts))].findings.facts["host"]
    title = (
        f"Blackout by cause under {' beside '.join([plan.chosen, ', '.join(n for n in series if n != plan.chosen)])}\n"
        f"mean of {len(next(iter(verdicts.values())).result.replicates)} replicates, host: {host}, "
        f"seed {plan.scenario.seed}"
    )
    files.append(output.write_file(run_dir / output.FIGURE, lambda path: draw_blackout(path, series, title)))
    return {path.name: path for path in files}


def _write_lanes(
    plan: Plan, run_dir: Path, results: Mapping[str, Result], say: Callable[[str], None]
) -> dict[str, Path]:
    files = write_lanes(plan.lanes, plan.chosen, plan.policies, results, run_dir, say)
    return {path.name: path for path in files}


def _shareable(config: dict[str, Any]) -> dict[str, Any]:
    """*config* without a password in the tracking URI: the file is copied into the store, where others see it."""
    tracking = config.get("tracking")
    if not isinstance(tracking, dict) or not isinstance(tracking.get("uri"), str):
        return config
    return config | {"tracking": tracking | {"uri": without_password(tracking["uri"])}}


def _write_errata(chosen: str, run_dir: Path, verdicts: Mapping[str, Verdict]) -> list[Path]:
    """The pages are on the chosen policy; so is `errata.json`, with the baselines' under "baselines"."""
    content: dict[str, Any] = {}
    files = []
    if chosen in verdicts:
        verdict = verdicts[chosen]
        content |= errata_as_json(verdict.findings, verdict.errata)
        for name, render in ((output.ERRATA_PAGE, errata_as_markdown), (output.ERRATA_RST, errata_as_rst)):
            page = render(verdict.findings, verdict.errata, verdict.about)
            files.append(output.write_text(run_dir / name, page))
    content["baselines"] = {
        name: errata_as_json(verdict.findings, verdict.errata) for name, verdict in verdicts.items() if name != chosen
    }
    return [output.write_json(run_dir / output.ERRATA_JSON, content), *files]


# ---- track -----------------------------------------------------------------------------------------------------------


def _track(plan: Plan, report: Report, tracker: Tracker, start_ms: int) -> Tracked:
    """Write one MLflow run a policy; a failure says that the results are safe in the run folder."""
    from spepolicy.errors import OutputError
    from spepolicy.lab.mlflow_runs import mlflow_runs

    try:
        return tracker.write(mlflow_runs(plan, report, start_ms))
    except OutputError as error:
        raise OutputError(f"{error} The results themselves are in '{report.run_dir}'.") from error


# ---- observers -------------------------------------------------------------------------------------------------------


def _tell_observers(plan: Plan, report: Report, say: Callable[[str], None]) -> None:
    from spepolicy.plugins import installed_reporters, make_plugin_manager

    notes: list[str] = []
    manager = make_plugin_manager(plan.policies[plan.chosen], list(installed_reporters().values()))
    _each_plugin(manager, "run_finished", notes, report=report)
    for note in notes:
        say(note)
