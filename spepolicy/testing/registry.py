"""What a check is, and the list of them: every function that is decorated with `check` is run by the kit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spepolicy.testing.subject import Subject

__all__ = ["CHECKS", "Check", "CheckFailed", "check"]


class CheckFailed(AssertionError):
    """A policy does not do what a check asks for. The message says what, where, and the likely fix."""


@dataclass(frozen=True)
class Check:
    """One check."""

    id: str
    summary: str
    run: Callable[[Subject], None]
    needs: tuple[str, ...]


CHECKS: dict[str, Check] = {}
"""All checks by id, in the order in which they run. `Check.needs` names what has to pass before."""


def check(*needs: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Make a function a check: its name without leading underscores is the id, its first line the summary."""

    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name = function.__name__.strip("_")
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        CHECKS[name] = Check(name, summary, function, needs)
        return function

    return register
