"""The summary on the terminal: this policy beside its baselines, the errata, and where everything is.

Plain ASCII, at most 110 columns where paths allow it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spepolicy.judge.attribution import bug_table, judge_bug
from spepolicy.judge.blackout import CAUSES
from spepolicy.lab.tracking import without_password
from spepolicy.machine.scenario import Bug

if TYPE_CHECKING:
    from spepolicy.judge.metrics import Measured
    from spepolicy.lab.run import Report

__all__ = ["WIDTH", "number_text", "summarize"]

WIDTH = 110
TOP_CAUSES = 4
_LABEL_WIDTH = 40

_HEAD_ROWS = (
    ("blackout_pct", "blackout, % of wanted time"),
    ("excess_blackout_pct", "  more than bare metal, paired, %"),
)
_ROWS = (
    ("longest_blackout_us", "longest blackout window, us"),
    ("unseen_samples_pct", "samples that the profile lacks, %"),
    ("missed_samples_pct", "  missed in blackout, %"),
    ("lost_samples_pct", "  lost at faults, %"),
    ("discarded_samples_pct", "  written and discarded, %"),
    ("diverged_samples_pct", "written where the VMM does not look, %"),
    ("fidelity_tv_excess", "profile distance beyond noise, 0..1"),
    ("stolen_pct", "vCPU time stolen, %"),
    ("pinned_peak_MiB", "pinned memory, peak MiB"),
    ("stage2_faults_per_s", "stage 2 faults, per wanted second"),
    ("attribution_accuracy_pct", "fault causes claimed rightly, %"),
)


_IF_ANY = ("diverged_samples_pct",)  # rows that are shown only where there is something


def summarize(report: Report) -> str:
    """Return the text of the summary."""
    lines = [_title(report), ""]
    measured = {name: verdict.measured for name, verdict in report.verdicts.items()}
    if report.chosen in measured:
        lines += [*_table(report.chosen, measured), ""]
        lines += [*_errata(report), ""]
        lines += _bug(report)
    else:
        lines += ["No replicate finished, so there is nothing to compare.", ""]
    for note in report.notes:
        lines += textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="      ")
    lines += _places(report)
    return "\n".join(lines)


def _title(report: Report) -> str:
    scenario = report.scenario
    text = (
        f"{report.chosen}: {report.replicates} replicates x {scenario.duration_ps / 1e12:g} s of guest time, "
        f"{scenario.guest.vcpus} vCPU, seed {scenario.seed}"
    )
    if not report.interrupted:
        return text
    done = ", ".join(f"{name} {count}" for name, count in report.finished.items())
    return f"{text}\nINTERRUPTED. Replicates finished: {done or 'none'}. What follows is of these only."


def _table(chosen: str, measured: Mapping[str, Measured]) -> list[str]:
    rows = [*_HEAD_ROWS, *_cause_rows(measured)]
    rows += [row for row in _ROWS if row[0] not in _IF_ANY or any(m.values.get(row[0], 0) for m in measured.values())]
    names = [chosen, *(name for name in measured if name != chosen)]
    cells = {name: [name, *(_cell(measured[name], metric) for metric, _ in rows)] for name in names}
    widths = {name: max(len(text) for text in column) + 3 for name, column in cells.items()}
    lines: list[str] = []
    for block in _blocks(names, widths):
        labels = ["mean +- 95 % confidence interval", *(label for _, label in rows)]
        for row, label in enumerate(labels):
            cells_text = "".join(cells[name][row].rjust(widths[name]) for name in block)
            lines.append(f"{label:<{_LABEL_WIDTH}}{cells_text}".rstrip())
            if row == 0:
                lines.append("-" * (_LABEL_WIDTH + sum(widths[name] for name in block)))
        lines.append("")
    return lines[:-1]


def _blocks(names: Sequence[str], widths: Mapping[str, int]) -> list[list[str]]:
    """Cut the columns into tables that fit; the chosen policy leads each."""
    blocks: list[list[str]] = []
    room = 0
    for name in names[1:]:
        if widths[name] > room:
            blocks.append([names[0]])
            room = WIDTH - _LABEL_WIDTH - widths[names[0]]
        blocks[-1].append(name)
        room -= widths[name]
    return blocks or [[names[0]]]


def _cause_rows(measured: Mapping[str, Measured]) -> list[tuple[str, str]]:
    """The causes that make the most blackout under any of the policies."""
    worst = {cause: max(m.values.get(f"blackout_{cause}_ms_per_s", 0.0) for m in measured.values()) for cause in CAUSES}
    causes = sorted((cause for cause in CAUSES if worst[cause] > 0), key=lambda cause: -worst[cause])[:TOP_CAUSES]
    return [(f"blackout_{cause}_ms_per_s", f"  of cause {cause.replace('_', ' ')}, ms/s") for cause in causes]


def _cell(measured: Measured, metric: str) -> str:
    if metric not in measured.values:
        return "-"
    mean, half = measured.values[metric], measured.ci95.get(metric, 0.0)
    return f"{number_text(mean)} +- {number_text(half, 2)}" if half else number_text(mean)


def number_text(value: float, digits: int = 3) -> str:
    """Return *value* with at least *digits* significant digits, without an exponent unless it is very small."""
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return f"{value:.1e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _errata(report: Report) -> list[str]:
    if not report.errata:
        return [f"Errata of {report.chosen}: none found, none documented."]
    lines = [f"Errata of {report.chosen}:"]
    for erratum in report.errata:
        text = f"  {erratum.id:<12} {erratum.severity:<7} x{erratum.count:<8} {erratum.title}"
        lines.append(text if len(text) <= WIDTH else text[: WIDTH - 3] + "...")
    return lines


def _bug(report: Report) -> list[str]:
    """Where a bug of KVM was injected: can each policy tell its faults from legitimate ones?"""
    if report.scenario.kvm.bug == Bug.NONE:
        return []
    verdicts = {name: judge_bug(v.result) for name, v in report.verdicts.items() if v.findings.virtualized}
    return [*bug_table(verdicts), ""]


def _places(report: Report) -> list[str]:
    if not report.files:
        return ["files: none"]
    names = ", ".join(path.name for path in report.files.values())
    lines = [f"files: {report.run_dir}"]
    lines += textwrap.wrap(names, WIDTH, initial_indent=" " * 7, subsequent_indent=" " * 7)
    if report.tracked is not None:
        command = report.tracked.ui_command()
        lines.append(f"mlflow: {command or without_password(report.tracked.uri)}")
        lines.append(f"        {report.tracked.link()}")
    return lines
