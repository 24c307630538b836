"""A sweep's summary on the terminal: a row a configuration, what failed, and where everything is.

Plain ASCII, at most 110 columns where names allow it.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from spepolicy.lab.summary import WIDTH, number_text
from spepolicy.lab.tracking import without_password

if TYPE_CHECKING:
    from spepolicy.lab.sweep.collect import Outcome
    from spepolicy.lab.sweep.run import SweepSummary
    from spepolicy.lab.sweep.sensitivity import Verdict

__all__ = ["HEADLINES", "cell_text", "summarize", "survival"]

MOST_ROWS = 40
MOST_FLIPS = 10
MOST_REFUSED = 10
HEADLINES = {  # the columns of every overview: metric -> heading
    "excess_blackout_pct": "excess blackout %",
    "unseen_samples_pct": "unseen %",
    "stolen_pct": "stolen %",
    "pinned_peak_MiB": "pinned MiB",
    "stage2_faults_per_s": "faults/s",
}


def summarize(summary: SweepSummary) -> str:
    """Return the text of the summary."""
    lines = [_title(summary), ""]
    if summary.outcomes:
        lines += [*_table(summary), ""]
    lines += _refused(summary)
    lines += _cannot_run(summary)
    if summary.verdicts:
        lines += [*survival(summary), ""]
    for note in summary.notes:
        lines += textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="      ")
    return "\n".join([*lines, *_places(summary)])


def _refused(summary: SweepSummary) -> list[str]:
    """Where the memlock limit refused sessions: a blackout of this cause looks like any other in the table."""
    where = [
        f"{outcome.label()} ({number_text(outcome.values['refused_sessions'])})"
        for outcome in summary.outcomes.values()
        if outcome.values.get("refused_sessions", 0.0) > 0
    ]
    if not where:
        return []
    more = f", and {len(where) - MOST_REFUSED:,} more in configurations.csv" if len(where) > MOST_REFUSED else ""
    text = f"kvm.memlock refused sessions (mean a VM) of: {', '.join(where[:MOST_REFUSED])}{more}."
    return [*textwrap.wrap(text, WIDTH, subsequent_indent="  "), ""]


def _cannot_run(summary: SweepSummary) -> list[str]:
    """A row for each job whose policy says that it cannot run on the machine of the job, with its reason."""
    lines = []
    for failure in summary.failures:
        if failure.cannot_run:
            text = f"{' '.join(failure.overrides)}: cannot run, {failure.cannot_run}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return [*lines, ""] if lines else []


def _title(summary: SweepSummary) -> str:
    chosen = [o for o in summary.outcomes.values() if o.configuration.role == "chosen"]
    lanes = sum(len(outcome.seed) for outcome in summary.outcomes.values())
    stored = lanes - summary.computed
    text = (
        f"{len(chosen):,} configurations, {lanes:,} lanes"
        + (f" ({stored:,} of them from the store)" if stored > 0 else "")
        + f" in {summary.seconds:.1f} s: {summary.compose_s:.1f} s composing, {summary.simulate_s:.1f} s simulating"
        + (f", {summary.tracking_s:.1f} s of MLflow beside it" if summary.tracking_s else "")
    )
    if summary.interrupted:
        text += f"\nINTERRUPTED: {summary.lanes - lanes:,} lanes are missing. Go on with sweep.resume=true."
    if summary.failures:
        text += f"\n{len(summary.failures):,} jobs failed, see above."
    return text


def _table(summary: SweepSummary) -> list[str]:
    outcomes = list(summary.outcomes.values())
    shown = outcomes[:MOST_ROWS]
    width = max(len("mean +- 95 %"), *(len(outcome.label()) for outcome in shown)) + 2
    columns = {name: [heading, *(cell_text(outcome, name) for outcome in shown)] for name, heading in HEADLINES.items()}
    widths = {name: max(map(len, cells)) + 2 for name, cells in columns.items()}
    rows = []
    for row, label in enumerate(["mean +- 95 %", *(outcome.label() for outcome in shown)]):
        rows.append(label.ljust(width) + "".join(columns[name][row].rjust(widths[name]) for name in HEADLINES))
    rows.insert(1, "-" * len(rows[0]))
    if len(outcomes) > len(shown):
        rows.append(f"... and {len(outcomes) - len(shown):,} more in configurations.csv")
    return [row.rstrip() for row in rows]


def survival(summary: SweepSummary, width: int = WIDTH) -> list[str]:
    """Return lines of at most *width* columns: which conclusions survive the ranges of the costs, where others end."""
    conclusions = {verdict.conclusion for verdict in summary.verdicts}
    weak = [verdict for verdict in summary.verdicts if not verdict.survives()]
    survivors = len(conclusions - {verdict.conclusion for verdict in weak})
    text = f"{survivors:,} of {len(conclusions):,} clear differences survive the whole range of every cost constant."
    lines = textwrap.wrap(text, width)
    labels = {key: outcome.label() for key, outcome in summary.outcomes.items()}
    for verdict in weak[:MOST_FLIPS]:
        conclusion = verdict.conclusion
        one, other = labels[conclusion.one], labels[conclusion.other]
        more = "more" if conclusion.sign() > 0 else "less"
        text = f"{one} has {more} {conclusion.metric} than {other}, but not with {_places_of(verdict)}"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    if len(weak) > MOST_FLIPS:
        lines.append(f"  ... and {len(weak) - MOST_FLIPS:,} more in sensitivity.csv")
    return lines


def _places_of(verdict: Verdict) -> str:
    from spepolicy.units import format_duration

    parts = []
    if verdict.flip_down_ps:
        parts.append(f"below {format_duration(verdict.flip_down_ps[0])}")
    if verdict.flip_up_ps:
        parts.append(f"above {format_duration(verdict.flip_up_ps[0])}")
    return f"costs.{verdict.cost} {' or '.join(parts)}"


def cell_text(outcome: Outcome, metric: str) -> str:
    """Return a metric of an outcome as tables show it."""
    if metric not in outcome.values:
        return "-"
    mean, half = outcome.values[metric], outcome.ci95.get(metric, 0.0)
    return f"{number_text(mean)} +- {number_text(half, 2)}" if half else number_text(mean)


def _places(summary: SweepSummary) -> list[str]:
    lines = [f"files: {summary.plan.folder}", f"       {', '.join(summary.files)}"]
    lines.append(f"rows:  pandas.read_parquet({str(summary.plan.store)!r})")
    if summary.tracked is not None:
        command = summary.tracked.ui_command()
        lines.append(f"mlflow: {command or without_password(summary.tracked.uri)}")
        lines.append(f"        {summary.tracked.link()}")
    return lines
