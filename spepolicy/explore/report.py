"""What an exploration says in the end: a table of policies by properties, what was covered and what was not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spepolicy.explore.acts import Budget, event_name
from spepolicy.explore.model import Settings
from spepolicy.explore.properties import PROPERTIES, Property
from spepolicy.explore.search import Found, Outcome

__all__ = ["Explored", "matrix", "summary", "verdict_rows"]


@dataclass(frozen=True)
class Explored:
    """One policy, explored."""

    policy: str
    instance: object
    outcome: Outcome
    traces: list[tuple[Found, str, Path]]  # violation, its trace as text, the file of it


def _holds(outcome: Outcome) -> str:
    if outcome.complete:
        return f"holds, all {outcome.states:,} states"
    return f"holds to depth {outcome.depth}, {outcome.states:,} states"


def verdict_rows(explored: Explored) -> Iterator[tuple[str, str]]:
    """Yield (property, verdict): what holds and how far, or after how many steps it is broken."""
    for name in (*(rule.name for rule in PROPERTIES), *(rule.name for rule in explored.outcome.added)):
        steps = [len(found.events) for found, _, _ in explored.traces if found.rule.name == name]
        yield name, f"broken in {min(steps)} steps" if steps else _holds(explored.outcome)


def _table(explored: Sequence[Explored]) -> list[str]:
    columns = [["property", *(name for name, _ in verdict_rows(explored[0]))]]
    columns += [[e.policy, *(verdict for _, verdict in verdict_rows(e))] for e in explored]
    widths = [max(len(cell) for cell in column) for column in columns]
    rows = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in zip(*columns, strict=True)]  # fmt: skip
    return [rows[0], "-" * max(len(row) for row in rows), *rows[1:]]


def matrix(explored: Sequence[Explored]) -> str:
    """Return the policies by the properties, and the shortest trace to each that is broken, as text without times: it
    depends on nothing but configuration and source.
    """
    rules = [*PROPERTIES, *(Property(a.name, a.rule, a.source, ()) for e in explored for a in e.outcome.added)]
    names = list(dict.fromkeys(rule.name for rule in rules))
    width = max(len(e.policy) for e in explored)
    lines = [
        f"{'policy':<{width}}  {'states':>9}  depth  " + " ".join(f"{n:>2}" for n in range(1, len(names) + 1)),
    ]
    lines.append("-" * len(lines[0]))
    traces = []
    for e in explored:
        cells = []
        for number, name in enumerate(names, 1):
            found = [f for f, _, _ in e.traces if f.rule.name == name]
            shortest = min(found, key=lambda f: len(f.events), default=None)
            cells.append(" ." if shortest is None else f"{len(shortest.events):2d}")
            if shortest is not None:
                traces.append(f"{e.policy} {number}: {_way(shortest)}")
        depth = "  all" if e.outcome.complete else f"{e.outcome.depth:5d}"
        lines.append(f"{e.policy:<{width}}  {e.outcome.states:>9,}  {depth}  {' '.join(cells)}")
    lines += ["", "A number: broken in so many steps. A dot: holds in all states of traces up to that depth.", ""]
    rule_of = {rule.name: rule.rule for rule in rules}
    lines += [f"{number:2d} {name}: {rule_of[name]}" for number, name in enumerate(names, 1)]
    return "\n".join([*lines, "", *traces]) + "\n"


def _way(found: Found) -> str:
    names = [event_name(event) for event in found.events]
    if found.cycle:
        return f"{', '.join(names[: -found.cycle])}; for ever: {', '.join(names[-found.cycle :])}"
    return ", ".join(names)


def _coverage(outcome: Outcome) -> str:
    """Say what was covered and what was not, in one sentence."""
    model = outcome.model
    limits = ", ".join(
        f"{model.limits[b]} {b.name.lower()}" for b in Budget if b is not Budget.NONE and model.limits[b]
    )
    every = f"every order of {len(model.events)} events ({limits} at most on a path)"
    if outcome.complete:
        return f"covered: {every}. Nothing is left."
    return (
        f"covered: {every}, in all traces of at most {outcome.depth} events. Not covered: longer traces, from "
        f"{outcome.left:,} states that were found and not unfolded; {outcome.stopped_by} ended the search."
    )


def summary(explored: Sequence[Explored], settings: Settings, folder: Path) -> str:
    """Return what is printed: states, table, coverage, and the shortest trace of the chosen policy."""
    lines = []
    for e in explored:
        o = e.outcome
        rate = o.states / max(o.seconds, 1e-9)
        lines.append(
            f"{e.policy}: {o.states:,} states, {o.transitions:,} transitions, depth {o.depth}, {o.seconds:.1f} s, "
            f"{rate:,.0f} states/s, {o.bytes_per_state:.0f} bytes a visited state"
        )
    lines += ["", *_table(explored), ""]
    lines += [f"{e.policy} {_coverage(e.outcome)}" for e in explored]
    machine = f"{settings.vcpus} vCPU, {settings.buffer_pages} buffer pages, {settings.guest} guest"
    machine += f", memlock {settings.memlock_pages} pages, memory {settings.backing.name.lower()}"
    if settings.migration:
        machine += f", migration {settings.migration.name.lower()} with handling {settings.handling.name.lower()}"
    lines += ["", f"machine: {machine}"]
    first = explored[0]
    if first.traces:
        _, text, path = min(first.traces, key=lambda trace: len(trace[0].events))
        lines += ["", f"The shortest of {len(first.traces)} traces of {first.policy} ({path.name}):", "", text.rstrip()]
    lines += ["", f"files: {folder}"]
    lines.append("       exploration.json, exploration.txt, properties.txt, and a .txt, a .yaml and a .pftrace a trace")
    return "\n".join(lines)
