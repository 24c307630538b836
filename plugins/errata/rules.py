"""The rules of the shipped reporter: each turns one kind of observation into an erratum, or says that there is none."""

from __future__ import annotations

from collections.abc import Callable

from spepolicy.judge.errata import Erratum, Findings

__all__ = ["RULES", "Rule", "observed", "rule"]

Rule = Callable[[Findings], Erratum | None]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Add *function* to the rules of the reporter."""
    RULES.append(function)
    return function


def observed(findings: Findings, name: str, **text: str) -> Erratum | None:
    """An erratum with count and first trace of observation *name*, or None if it did not happen."""
    seen = findings.seen(name)
    if seen.count == 0:
        return None
    return Erratum(**text, count=seen.count, first_trace=seen.first)
