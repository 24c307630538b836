"""The kit as a pytest class: a test a check, with declared failures as expected ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spepolicy.testing import CHECKS

TESTS = """
from dataclasses import dataclass
from spepolicy.batch import Vcpus
from spepolicy.hookspecs import Event, hookimpl
from spepolicy.testing.suite import PolicyChecks

@dataclass
class Refuse:
    \"\"\"Tell the guest that it cannot profile.

    Mechanism: every fault is answered with an event.
    Source: this test.
    Needs: nothing.
    Costs: the profile.
    Fails: never.
    \"\"\"

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.{event})

class TestRefuse(PolicyChecks):
    policy = Refuse()
    expected_failures = {declared}
"""


def run(folder: Path, event: str, declared: dict[str, str]) -> str:
    (folder / "test_refuse.py").write_text(TESTS.format(event=event, declared=declared))
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.stdout


def test_each_check_is_a_test(tmp_path: Path) -> None:
    out = run(tmp_path, "IMPDEF", {})
    for check in CHECKS:
        assert f"PASSED test_refuse.py::TestRefuse::test_policy[{check}]" in out


@pytest.mark.slow
def test_a_failure_names_the_check_and_a_declared_one_is_expected(tmp_path: Path) -> None:
    assert "FAILED test_refuse.py::TestRefuse::test_policy[allowed_events]" in run(tmp_path, "EXTERNAL_ABORT", {})
    reason = "an old guest needs it"
    out = run(tmp_path, "EXTERNAL_ABORT", {"allowed_events": reason, "catalogue": reason})
    assert "XFAIL test_refuse.py::TestRefuse::test_policy[allowed_events] - an old guest needs it" in out
    assert "unexpected pass" not in out
    assert "FAILED" not in out
