"""Run the checks on a policy and say how each of them ended."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.testing import checks, corner_cases, lives
from spepolicy.testing.registry import CHECKS, CheckFailed
from spepolicy.testing.subject import Subject

__all__ = ["Outcome", "check_policy", "require_known"]

_SOURCES = (checks, corner_cases, lives)  # importing them fills CHECKS, in this order


@dataclass(frozen=True)
class Outcome:
    """How one check ended.

    `status` is "passed", "failed", "expected" (a declared failure), "unexpected pass" (declared, but it did not happen)
    or "not run" (another check failed first).
    """

    check: str
    status: str
    message: str = ""

    @property
    def ok(self) -> bool:
        """Nothing has to be done about it."""
        return self.status in ("passed", "expected")

    def __str__(self) -> str:
        return f"{self.status:15} {self.check:26} {self.message}".rstrip()


def check_policy(
    policy: object, *, expected_failures: Mapping[str, str] | None = None, only: Collection[str] | None = None
) -> list[Outcome]:
    """Run every check on the instance *policy* and return how each ended, in the order of `CHECKS`.

    *expected_failures* maps the id of a check to the reason why this policy fails it by design. *only*: ids of checks
    to run, with those that they need. Raise ConfigurationError for an id that does not exist and for an empty reason.
    """
    expected = dict(expected_failures or {})
    require_known(expected)
    subject = Subject(policy)
    outcomes: dict[str, Outcome] = {}
    for name in CHECKS if only is None else _with_needs(only):
        outcomes[name] = _outcome(subject, name, expected, outcomes)
    return list(outcomes.values())


def _with_needs(names: Collection[str]) -> list[str]:
    """Return *names* and what they need, in the order of CHECKS."""
    require_known(dict.fromkeys(names, "chosen"), "only")
    wanted = set(names)
    for name in reversed(CHECKS):  # what a check needs comes before it
        if name in wanted:
            wanted |= set(CHECKS[name].needs)
    return [name for name in CHECKS if name in wanted]


def require_known(expected: Mapping[str, str], where: str = "expected_failures") -> None:
    """Raise ConfigurationError unless *expected* maps ids of checks to reasons. *where*: what it is called."""
    for name, reason in expected.items():
        if name not in CHECKS:
            raise ConfigurationError(
                f"{where} has '{name}', which is no check. Rule: one of {', '.join(CHECKS)}.{nearest(name, CHECKS)}"
            )
        if not str(reason).strip():
            raise ConfigurationError(f"expected_failures['{name}'] has no reason. Remedy: say why it fails by design.")


def _outcome(subject: Subject, name: str, expected: Mapping[str, str], before: Mapping[str, Outcome]) -> Outcome:
    check = CHECKS[name]
    blocked = [need for need in check.needs if before[need].status not in ("passed", "unexpected pass")]
    if blocked:
        return Outcome(name, "not run", f"needs {', '.join(blocked)}")
    try:
        check.run(subject)
    except CheckFailed as error:
        if name in expected:
            return Outcome(name, "expected", f"{expected[name]} ({error})")
        return Outcome(name, "failed", str(error))
    if name in expected:
        return Outcome(
            name, "unexpected pass", f"declared to fail: {expected[name]}. Remedy: take it out of expected_failures."
        )
    return Outcome(name, "passed")
