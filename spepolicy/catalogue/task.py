"""`task=catalogue`: run all of it on every installed policy, or on the one that is chosen, and print the table."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from spepolicy.catalogue.case import Case, OutOfScope, read_catalogue
from spepolicy.catalogue.run import Outcome, run_catalogue

__all__ = ["catalogue_table", "run_task"]

WIDTH = 110


def run_task(policies: dict[str, object], folder: Path | None = None) -> tuple[str, bool]:
    """Run the catalogue on *policies*; return the text to print, and whether every verdict holds.

    With *folder* the outcomes go to `catalogue.json` in it.
    """
    from spepolicy.drivers.simulate import compile_machine

    cases, left_out = read_catalogue()
    compile_machine(lambda text: print(text, flush=True))
    begin = time.perf_counter()
    outcomes = run_catalogue(cases, policies)
    seconds = time.perf_counter() - begin
    if folder is not None:
        _write(outcomes, folder)
    return catalogue_table(cases, left_out, list(policies), outcomes, seconds), not any(
        o.disagreements for o in outcomes
    )


def catalogue_table(
    cases: Sequence[Case],
    left_out: Sequence[OutOfScope],
    policies: Sequence[str],
    outcomes: Sequence[Outcome],
    seconds: float,
) -> str:
    """Return the table of cases by policies, and below it every disagreement with its explanation."""
    marks: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        marks.setdefault((outcome.case, outcome.policy), []).append(outcome.mark)
    titles = {case.id: f"{case.id} {case.title}" for case in cases}
    first = min(46, max(len(title) for title in titles.values()))
    letters = [chr(ord("a") + n) if n < 26 else f"{n}" for n in range(len(policies))]
    lines = [
        "Policies:",
        *textwrap.wrap("  ".join(f"{a} {p}" for a, p in zip(letters, policies, strict=True)), WIDTH),
        "",
    ]
    lines.append(f"{'case':{first}} " + " ".join(f"{letter:4}" for letter in letters))
    for case in cases:
        cells = [_joined(marks.get((case.id, policy), ["?"])) for policy in policies]
        lines.append(f"{titles[case.id]:{first}.{first}} " + " ".join(f"{cell:4}" for cell in cells))
    lines += [
        "",
        "ok as the sources say   B with blackout   . the sources say nothing   X otherwise   - does not run here",
        "",
    ]
    lines += _explanations(outcomes)
    lines += ["Not in the catalogue:", *(f"  {row.id} {row.title}: {row.why}" for row in left_out), ""]
    judged = [outcome for outcome in outcomes if outcome.judged]
    wrong = sum(bool(outcome.disagreements) for outcome in outcomes)
    lines.append(
        f"{len(cases)} cases, {len(policies)} policies, {len(outcomes)} runs, {len(judged)} verdicts, "
        f"{wrong} disagreements, in {seconds:.1f} s"
    )
    return "\n".join(line.rstrip() for line in lines)


def _joined(marks: Sequence[str]) -> str:
    """One mark for all versions; the worst where they differ."""
    for worst in ("X", "-"):
        if worst in marks:
            return worst
    return marks[0] if len(set(marks)) == 1 else max(marks, key=len)


def _explanations(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        for problem in outcome.disagreements:
            text = f"X {outcome.case} {outcome.policy}, PMSVer {outcome.version}: {problem}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
    reasons = dict.fromkeys(
        (outcome.policy, outcome.reason) for outcome in outcomes if outcome.seen is None and outcome.reason
    )
    lines += [f"- {policy}: {reason}" for policy, reason in reasons]
    return [*lines, ""] if lines else []


def _write(outcomes: Sequence[Outcome], folder: Path) -> None:
    from dataclasses import asdict

    from spepolicy.lab import output

    output.write_json(folder / "catalogue.json", {"outcomes": [asdict(outcome) for outcome in outcomes]})
