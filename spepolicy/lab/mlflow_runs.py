"""From a report to MLflow runs: one flat run a policy, so that MLflow's table and charts compare them as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from spepolicy.judge.blackout import CAUSES
from spepolicy.lab.tracking import RunRecord, flat_params

if TYPE_CHECKING:
    from spepolicy.lab.run import Plan, Report, Verdict

__all__ = ["mlflow_runs"]

_NOT_COMPARED = ("tracking", "output", "explore")  # neither where results go, nor what another task does


def mlflow_runs(plan: Plan, report: Report, start_ms: int) -> list[RunRecord]:
    """Return one record a policy, the chosen one first; the files of the run folder go with the chosen policy's."""
    return [_record(plan, report, verdict, start_ms) for verdict in report.verdicts.values()]


def _record(plan: Plan, report: Report, verdict: Verdict, start_ms: int) -> RunRecord:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("spepolicy")
    except PackageNotFoundError:
        ours = "not installed"
    title = plan.tracking.run_name or f"{plan.chosen} seed={plan.scenario.seed}"
    chosen = verdict.policy == plan.chosen
    tags = {
        "policy": verdict.policy,
        "role": verdict.role,
        "compared_with": plan.chosen,
        "spepolicy_version": ours,
        "mlflow.source.name": "spepolicy",
        "mlflow.source.type": "LOCAL",
    }
    if chosen:
        tags["mlflow.note.content"] = f"```\n{report.summary()}\n```"
    return RunRecord(
        name=title if chosen else f"{verdict.policy} (baseline of {title})",
        tags=tags,
        params=_params(plan, verdict.policy),
        metrics=verdict.numbers() | {f"ci95/{name}": half for name, half in verdict.measured.ci95.items()},
        series=_series(verdict),
        files=[str(path) for path in report.files.values()] if chosen else [],
        status="KILLED" if report.interrupted else "FINISHED",
        start_ms=start_ms,
        end_ms=int(time.time() * 1000),
    )


def _params(plan: Plan, policy: str) -> dict[str, str]:
    """The configuration as flat keys, for comparing runs. The whole of it is in the file `config.json`.

    Group `policy` is replaced by the fields that this run's policy really had. A workload has hundreds of keys, which
    would bury the others in MLflow's tables: it is told by its texts and a hash of its content.
    """
    config = {key: value for key, value in plan.config.items() if key not in ("policy", *_NOT_COMPARED)}
    if isinstance(work := config.get("workload"), Mapping):
        content = json.dumps(work, sort_keys=True, default=str)
        scalars = {key: value for key, value in work.items() if not isinstance(value, (Mapping, list, tuple))}
        config["workload"] = scalars | {"content_hash": hashlib.sha256(content.encode()).hexdigest()[:12]}
    instance = plan.policies[policy]
    fields = {}
    if dataclasses.is_dataclass(instance) and not isinstance(instance, type):
        fields = dataclasses.asdict(instance)
    return {"policy": policy} | flat_params(config) | flat_params(fields, "policy.")


def _series(verdict: Verdict) -> list[tuple[str, int, float]]:
    """Blackout over guest time as MLflow step metrics: step = start of the bin in ms of guest time."""
    starts_ms = [round(edge * 1e3) for edge in verdict.series.edges_s[:-1].tolist()]
    columns = {"all_causes": verdict.series.ms_per_s.sum(axis=1)}
    columns |= {name: verdict.series.ms_per_s[:, cause] for cause, name in enumerate(CAUSES)}
    return [
        (f"blackout_over_time/{name}_ms_per_s", step, float(value))
        for name, values in columns.items()
        if name == "all_causes" or values.any()
        for step, value in zip(starts_ms, values, strict=True)
    ]
