"""`task=catalogue`: run all of it on every installed policy, or on the one that is chosen, and print the table."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from spepolicy.catalogue.case import DRIVERS, Case, OutOfScope, read_catalogue
from spepolicy.catalogue.run import Outcome, run_catalogue

__all__ = ["catalogue_table", "run_task"]

WIDTH = 110


def run_task(policies: dict[str, object], folder: Path | None = None) -> tuple[str, bool]:
    """Run the catalogue on *policies*; return the text to print, and whether every verdict holds.

    With *folder* the outcomes go to `catalogue.json` in it.
    """
    from spepolicy.drivers.compiling import compile_machine

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
    """Return the tables of cases by policies and of what the guest is told by drivers, and below them every
    disagreement with its explanation.
    """
    first = min(46, max(len(_title(case)) for case in cases))
    letters = [chr(ord("a") + n) if n < 26 else f"{n}" for n in range(len(policies))]
    lines = [
        "Policies:",
        *textwrap.wrap("  ".join(f"{a} {p}" for a, p in zip(letters, policies, strict=True)), WIDTH),
        "",
    ]
    lines += _grid([case for case in cases if not case.answer], first, letters, policies, outcomes)
    answered = [case for case in cases if case.answer]
    if answered:
        lines += ["", "What the guest is told, and what its driver makes of it (a policy that gives this answer only):"]
        lines += _grid(answered, first, DRIVERS, DRIVERS, outcomes)
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


def _title(case: Case) -> str:
    return f"{case.id} {case.title}"


def _grid(
    cases: Sequence[Case], first: int, heads: Sequence[str], names: Sequence[str], outcomes: Sequence[Outcome]
) -> list[str]:
    """Return a line a case with its mark for each of *names*, below a line of *heads*."""
    marks: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        marks.setdefault((outcome.case, outcome.policy), []).append(outcome.mark)
    width = max(4, *(len(head) for head in heads))
    lines = [f"{'case':{first}} " + " ".join(f"{head:{width}}" for head in heads)]
    for case in cases:
        cells = [_joined(marks.get((case.id, name), ["?"])) for name in names]
        lines.append(f"{_title(case):{first}.{first}} " + " ".join(f"{cell:{width}}" for cell in cells))
    return lines


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
