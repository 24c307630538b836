"""The kit for authors of policies: does a policy keep the contract of `spepolicy.hookspecs`, and does it behave?

In a test of your own, one test a check::

    from spepolicy.testing.suite import PolicyChecks

    class TestMyPolicy(PolicyChecks):
        policy = MyPolicy()

From Python, or from the shell with `python -m spepolicy.testing NAME`::

    from spepolicy.testing import check_policy

    for outcome in check_policy(MyPolicy()):
        print(outcome)

Each check has an id, and a message that names the cause and the likely fix. A failure that is the price of the policy's
design is declared with its reason: `expected_failures = {"memlock": "the VMM raises its limit"}`; it is reported if it
no longer happens.
"""

from __future__ import annotations

from spepolicy.testing.checking import Outcome, check_policy
from spepolicy.testing.registry import CHECKS, Check, CheckFailed

__all__ = ["CHECKS", "Check", "CheckFailed", "Outcome", "check_policy"]
