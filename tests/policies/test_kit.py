"""Every shipped policy passes the author's kit, but for what its design costs."""

from __future__ import annotations

import pytest

from spepolicy.plugins import build_policy, installed_policies
from spepolicy.testing import CHECKS, check_policy

OLD_ABORT = "it tells an external abort, as the series of its time did; SPE-KVM-1 documents it from SPEv1p3 on"
RAISED = "the VMM raises its limit to the size of the VM (raise_memlock)"
EXPECTED: dict[str, dict[str, str]] = {
    "map_on_fault": {"no_silent_cut": "it goes on like after an ordinary fault, and does not look at DL: its flaw"},
    "mlock_finalize": {"memlock": RAISED, "allowed_events": OLD_ABORT},
    "physical_mode": {
        "pins_end_with_the_session": "a new ring beside the old one looks like its next part, and both stay pinned"
    },
    "pin_vm": {"memlock": RAISED, "allowed_events": OLD_ABORT},
}
SHIPPED = sorted(name for name, info in installed_policies().items() if info.distribution == "spepolicy")


def test_only_shipped_policies_have_exceptions() -> None:
    assert set(EXPECTED) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_policy_passes_the_kit(name: str) -> None:
    outcomes = check_policy(build_policy(name, {}), expected_failures=EXPECTED.get(name, {}))
    assert len(outcomes) == len(CHECKS)
    assert [str(outcome) for outcome in outcomes if not outcome.ok] == []
