"""A sweep as plain text for a mail to a list: ASCII, lines of at most 75 columns, everything needed to repeat it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from spepolicy.lab.run import CHOSEN
from spepolicy.lab.sweep.comparison import conclusions
from spepolicy.lab.sweep.identity import provenance
from spepolicy.lab.sweep.summary import HEADLINES, cell_text, survival

if TYPE_CHECKING:
    from spepolicy.lab.sweep.collect import Outcome
    from spepolicy.lab.sweep.run import SweepSummary

__all__ = ["COLUMNS", "mail_text"]

COLUMNS = 75  # the kernel's submitting-patches.rst wraps texts there, so that they survive being quoted
MOST_CONFIGURATIONS = 8  # more are a table, not a mail
MOST_CONCLUSIONS = 6
_ROWS = {**HEADLINES, "fidelity_tv_excess": "profile distance"}
_NO_INFLUENCE = ("tracking", "output.", "hydra", "sweep.", "threads")
_LABEL = max(map(len, _ROWS.values())) + 1


def mail_text(summary: SweepSummary) -> str:
    """Return the text: what was run, a table of means with 95 % intervals, what the differences say, errata, notes."""
    chosen = [outcome for outcome in summary.outcomes.values() if outcome.configuration.role == CHOSEN]
    others = [outcome for outcome in summary.outcomes.values() if outcome.configuration.role != CHOSEN]
    shown = (chosen + others)[:MOST_CONFIGURATIONS]
    parts = [_origin(summary), _legend(shown, len(summary.outcomes)), _table(shown)]
    said = conclusions(summary.outcomes.values())
    parts.append("\n".join(_wrapped(line.replace("`", ""), "* ") for line in said[:MOST_CONCLUSIONS]))
    if len(said) > MOST_CONCLUSIONS:
        parts.append(f"{len(said) - MOST_CONCLUSIONS:,} more pairs are in report.html.")
    if summary.verdicts:
        parts.append("\n".join(survival(summary, COLUMNS)))
    parts.append("Errata that occurred:\n" + "\n".join(_errata(shown)))
    parts += [_wrapped(note) for note in summary.notes]
    if summary.interrupted:
        parts.insert(0, "INTERRUPTED: not all lanes are in these numbers.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _wrapped(text: str, begin: str = "") -> str:
    return textwrap.fill(
        text, COLUMNS, initial_indent=begin, subsequent_indent=" " * len(begin), break_on_hyphens=False
    )


def _origin(summary: SweepSummary) -> str:
    here = provenance()
    state = {"true": ", with local changes", "false": ""}.get(here["dirty"], "")
    commit = f"commit {here['commit'][:12]}{state}" if here["commit"] else f"source {here['source']}"
    config = summary.plan.jobs[0].config
    lines = [f"spepolicy {here['spepolicy']}, {commit}", f"  {here['versions']}"]
    lines += [_command(job.overrides) for job in summary.plan.jobs[:MOST_CONFIGURATIONS]]
    if len(summary.plan.jobs) > MOST_CONFIGURATIONS:
        lines.append(f"  and {len(summary.plan.jobs) - MOST_CONFIGURATIONS:,} more, in sweep.json")
    lines.append(
        _wrapped(
            f"{config['replicates']} replicates of {config['duration']} of guest time, seed {config['seed']}, "
            f"{config['guest']['vcpus']} vCPU, unless a command says otherwise; mean +- 95 %."
        )
    )
    return "\n".join(lines)


def _command(overrides: tuple[str, ...]) -> str:
    """What runs one configuration, without the words that change no result."""
    words = [word for word in overrides if not word.startswith(_NO_INFLUENCE)]
    command = textwrap.wrap(
        " ".join(["python -m spepolicy", *words]), COLUMNS - 6, break_long_words=False, break_on_hyphens=False
    )
    return "  " + " \\\n      ".join(command)


def _legend(shown: list[Outcome], total: int) -> str:
    lines = [f"  [{n}] {outcome.label()}" for n, outcome in enumerate(shown, 1)]
    if total > len(shown):
        lines.append(f"  {total - len(shown):,} more configurations are in configurations.csv")
    return "\n".join(lines)


def _table(shown: list[Outcome]) -> str:
    """Metrics by configurations, in as many tables side by side as it takes."""
    columns = [[f"[{n}]", *(cell_text(outcome, metric) for metric in _ROWS)] for n, outcome in enumerate(shown, 1)]
    blocks: list[list[list[str]]] = [[]]
    room = COLUMNS - _LABEL
    for column in columns:
        width = max(map(len, column)) + 2
        if width > room and blocks[-1]:
            blocks.append([])
            room = COLUMNS - _LABEL
        blocks[-1].append([cell.rjust(width) for cell in column])
        room -= width
    return "\n\n".join("\n".join(_lines(block)) for block in blocks)


def _lines(block: list[list[str]]) -> list[str]:
    cells = zip(["", *_ROWS.values()], *block, strict=True)
    return ["".join([label.ljust(_LABEL), *numbers]).rstrip() for label, *numbers in cells]


def _errata(shown: list[Outcome]) -> list[str]:
    """A line for each erratum that occurred: how often under which configuration."""
    found: dict[tuple[str, str], list[str]] = {}
    for n, outcome in enumerate(shown, 1):
        for erratum in outcome.errata:
            if erratum.count:
                found.setdefault((erratum.id, erratum.title), []).append(f"[{n}] {erratum.count:,} times")
    lines = [_wrapped(f"{name}, {title}: {', '.join(where)}", "* ") for (name, title), where in found.items()]
    return lines or ["* none"]
