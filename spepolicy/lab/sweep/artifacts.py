"""The files of a sweep's folder. `WRITERS` is the list of what is made: each entry gives one file, or none.

A further file (a report, a timeline) is one more entry; it is then listed, and tracked with the summary run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spepolicy.judge.errata_page import matrix_as_markdown
from spepolicy.judge.metrics import METRICS
from spepolicy.lab import output
from spepolicy.lab.sweep.identity import provenance
from spepolicy.lab.tracking import without_password

if TYPE_CHECKING:
    from spepolicy.lab.sweep.run import SweepSummary

__all__ = ["WRITERS", "configuration_table", "write_artifacts"]

Writer = Callable[["SweepSummary", Path], "Path | None"]  # (summary, where the file goes) -> the file, None for none


def configuration_table(summary: SweepSummary) -> dict[str, list[Any]]:
    """Return a column a name, a row a configuration that has lanes: what varies, then every metric with its interval.

    `NAME_ci95` is the half-width of the 95 % confidence interval of the mean NAME; None where not defined.
    """
    outcomes = list(summary.outcomes.values())
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.configuration.params))
    table: dict[str, list[Any]] = {
        "configuration": [outcome.label() for outcome in outcomes],
        "policy": [outcome.configuration.policy.name for outcome in outcomes],
        "role": [outcome.configuration.role for outcome in outcomes],
        **{key: [outcome.configuration.params.get(key) for outcome in outcomes] for key in keys},
        "lanes": [len(outcome.seed) for outcome in outcomes],
    }
    for name in METRICS:
        if any(name in outcome.values for outcome in outcomes):
            table[name] = [outcome.values.get(name) for outcome in outcomes]
            if any(name in outcome.ci95 for outcome in outcomes):
                table[f"{name}_ci95"] = [outcome.ci95.get(name) for outcome in outcomes]
    table["pareto"] = [outcome.configuration.key in summary.pareto for outcome in outcomes]
    table["errata"] = [" ".join(erratum.id for erratum in outcome.errata if erratum.count) for outcome in outcomes]
    table["config_hash"] = [outcome.configuration.key for outcome in outcomes]
    return table


def _configurations(summary: SweepSummary, path: Path) -> Path | None:
    return _write_csv(path, configuration_table(summary))


def _differences(summary: SweepSummary, path: Path) -> Path | None:
    """Every paired difference between two policies on one scenario."""
    from spepolicy.lab.sweep.statistics import difference_table

    return _write_csv(path, difference_table(summary.differences, summary.outcomes)) if summary.differences else None


def _sensitivity(summary: SweepSummary, path: Path) -> Path | None:
    """Which conclusions survive the ranges of the cost constants, and where the others flip."""
    from spepolicy.lab.sweep.sensitivity import verdict_table

    return _write_csv(path, verdict_table(summary.verdicts, summary.outcomes)) if summary.verdicts else None


def _write_csv(path: Path, table: Mapping[str, list[Any]]) -> Path:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return output.write_text(path, text.getvalue())


def _errata(summary: SweepSummary, path: Path) -> Path | None:
    """Every erratum of every configuration, with its counts there."""
    content: dict[str, Any] = {}
    for outcome in summary.outcomes.values():
        for erratum in outcome.errata:
            entry = content.setdefault(erratum.id, asdict(erratum) | {"count": 0, "configurations": {}})
            entry["count"] += erratum.count
            entry["configurations"][outcome.label()] = erratum.count
            entry.pop("first_trace", None)
    return output.write_json(path, content)


def _errata_table(summary: SweepSummary, path: Path) -> Path | None:
    """Policy (with what differs) by SPE version by erratum."""
    runs = [
        (outcome.label(), outcome.findings.spe_version, outcome.errata)
        for outcome in summary.outcomes.values()
        if outcome.findings.virtualized
    ]
    return output.write_text(path, matrix_as_markdown(runs)) if runs else None


def _sweep(summary: SweepSummary, path: Path) -> Path | None:
    """What was asked for, what failed, where the rows are, and where and with what they were computed."""
    plan = summary.plan
    content = {
        "name": plan.name(),
        "store": str(plan.store.absolute()),
        "jobs": [{"number": job.number, "overrides": list(job.overrides)} for job in plan.jobs],
        "failures": [asdict(failure) for failure in summary.failures],
        "lanes": summary.lanes,
        "computed": summary.computed,
        "interrupted": summary.interrupted,
        "seconds": {
            "compose": round(summary.compose_s, 3),
            "simulate": round(summary.simulate_s, 3),
        },
        "workers": summary.workers,
        "notes": summary.notes,
        "provenance": provenance(),
        "config": _shareable(plan.jobs[0].config) if plan.jobs else {},
    }
    return output.write_json(path, content)


def _shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the first job without a password, and without the workload, which is long."""
    shown: dict[str, Any] = json.loads(json.dumps(config, default=str))
    shown.pop("workload", None)
    if isinstance(uri := shown.get("tracking", {}).get("uri"), str):
        shown["tracking"]["uri"] = without_password(uri)
    return shown


def _report(summary: SweepSummary, path: Path) -> Path | None:
    """Tables, figures and conclusions on one page."""
    from spepolicy.lab.sweep.report import write_report

    return write_report(summary, path)


def _mail(summary: SweepSummary, path: Path) -> Path | None:
    """The comparison as plain text that can be sent to a list."""
    from spepolicy.lab.sweep.mail import mail_text

    return output.write_text(path, mail_text(summary))


WRITERS: dict[str, Writer] = {
    "sweep.json": _sweep,
    "configurations.csv": _configurations,
    "differences.csv": _differences,
    "sensitivity.csv": _sensitivity,
    "errata.json": _errata,
    "errata_table.md": _errata_table,
    "report.html": _report,
    "mail.txt": _mail,
}
"""File name -> what writes it. Those that find nothing to write return None."""


def write_artifacts(summary: SweepSummary) -> dict[str, Path]:
    """Write every file of the sweep's folder and return them by name. What a plug-in writer cannot do is noted."""
    files: dict[str, Path] = {}
    for name, write in WRITERS.items():
        if not summary.outcomes and name != "sweep.json":
            continue
        path = write(summary, summary.plan.folder / name)
        if path is not None:
            files[name] = path
    return files
