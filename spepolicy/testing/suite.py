"""The checks as a pytest class, a test each::

class TestMyPolicy(PolicyChecks):
    policy = MyPolicy()
    expected_failures = {"memlock": "the VMM has CAP_IPC_LOCK"}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from spepolicy.testing.checking import Outcome, check_policy
from spepolicy.testing.registry import CHECKS

__all__ = ["PolicyChecks"]


class PolicyChecks:
    """Derive a class named Test... from it and set `policy`."""

    policy: ClassVar[Any]
    expected_failures: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture(scope="class")
    def outcomes(self, request: pytest.FixtureRequest) -> dict[str, Outcome]:
        """How each check ended."""
        cls = request.cls
        return {outcome.check: outcome for outcome in check_policy(cls.policy, expected_failures=cls.expected_failures)}

    @pytest.mark.parametrize("check", CHECKS)
    def test_policy(self, check: str, outcomes: dict[str, Outcome]) -> None:
        """One check of `spepolicy.testing.checks`."""
        outcome = outcomes[check]
        if outcome.status == "not run":
            pytest.skip(outcome.message)
        if outcome.status == "expected":
            pytest.xfail(outcome.message)
        if not outcome.ok:
            pytest.fail(f"{check}: {outcome.message}", pytrace=False)
