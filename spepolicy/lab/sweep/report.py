"""The report of a sweep: one HTML page that needs nothing else."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spepolicy.lab import output
from spepolicy.lab.run import CHOSEN
from spepolicy.lab.sweep.comparison import conclusions
from spepolicy.lab.sweep.identity import provenance
from spepolicy.lab.sweep.report_figures import FIGURES
from spepolicy.lab.sweep.summary import HEADLINES, cell_text

if TYPE_CHECKING:
    from spepolicy.lab.sweep.run import SweepSummary

__all__ = ["render", "write_report"]

MOST_ROWS = 300
MOST_CONCLUSIONS = 30


def write_report(summary: SweepSummary, path: Path) -> Path | None:
    """Write the report of *summary* to *path* and return it; None if no lane finished."""
    return output.write_text(path, render(summary)) if summary.outcomes else None


def render(summary: SweepSummary) -> str:
    """Return the page as text."""
    from jinja2 import Environment

    template = files("spepolicy.lab.sweep").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    return page.render(**_content(summary)) + "\n"


def _content(summary: SweepSummary) -> dict[str, Any]:
    outcomes = list(summary.outcomes.values())
    chosen = [outcome for outcome in outcomes if outcome.configuration.role == CHOSEN]
    lanes = sum(len(outcome.seed) for outcome in outcomes)
    said = conclusions(outcomes)
    here = provenance()
    return {
        "title": f"Sweep {summary.plan.name()}",
        "subtitle": (
            f"{len(chosen)} configurations and {len(outcomes) - len(chosen)} baselines, {lanes} lanes, "
            f"{summary.simulate_s:.1f} s of simulation on {summary.workers}."
        ),
        "interrupted": summary.interrupted,
        "missing": summary.lanes - lanes,
        "conclusions": said[:MOST_CONCLUSIONS],
        "more_conclusions": max(0, len(said) - MOST_CONCLUSIONS),
        "headings": list(HEADLINES.values()),
        "rows": [
            {
                "label": outcome.label(),
                "cells": [cell_text(outcome, name) for name in HEADLINES],
                "lanes": len(outcome.seed),
                "errata": " ".join(erratum.id for erratum in outcome.errata if erratum.count),
            }
            for outcome in outcomes[:MOST_ROWS]
        ],
        "more_rows": max(0, len(outcomes) - MOST_ROWS),
        "figures": [figure for figure in (draw(outcomes) for draw in FIGURES) if figure is not None],
        "tables": [_errata_table(summary)] if any(e.count for o in outcomes for e in o.errata) else [],
        "failures": [failure.message() for failure in summary.failures],
        "notes": summary.notes,
        "store": str(summary.plan.store),
        "provenance": ", ".join(f"{name} {value}" for name, value in here.items() if value not in ("", None)),
    }


def _errata_table(summary: SweepSummary) -> dict[str, Any]:
    """A row an erratum that occurred, a column a policy: in how many configurations, and how often."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    titles: dict[str, str] = {}
    for outcome in summary.outcomes.values():
        for erratum in outcome.errata:
            if erratum.count:
                titles[erratum.id] = erratum.title
                key = (erratum.id, outcome.configuration.policy.name)
                configurations, times = counts.get(key, (0, 0))
                counts[key] = (configurations + 1, times + erratum.count)
    policies = list(dict.fromkeys(policy for _, policy in counts))
    body = []
    for name, title in titles.items():
        cells = [counts.get((name, policy)) for policy in policies]
        body.append([f"{name}: {title}", *(f"{cell[1]:,} in {cell[0]}" if cell else "" for cell in cells)])
    return {
        "title": "Errata",
        "text": "How often, and in how many configurations of the policy; errata.json has the texts.",
        "head": ["erratum", *policies],
        "body": body,
    }
