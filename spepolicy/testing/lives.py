"""Checks of what a policy does when the life of its VM is not an ordinary one: live migrations, done and given up, and
a VMM that is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from spepolicy.drivers import simulate as driver
from spepolicy.machine.host import PIN_MASK, PIN_ONE, ROLE_BUFFER, ROLE_MASK, ROLE_SHIFT
from spepolicy.machine.scenario import Handling, Migration, MigrationKind, Scenario
from spepolicy.machine.state import Hook
from spepolicy.testing.registry import CheckFailed, check
from spepolicy.testing.scenes import MS, US
from spepolicy.testing.subject import Subject

_QUICK = Migration(
    kind=MigrationKind.PRECOPY, start_ps=700 * US, bandwidth_bytes_per_us=100_000, max_downtime_ps=10 * MS,
    switch_ps=20 * US, working_set_pages=16, request_ps=2 * US,
)  # fmt: skip

# In the scene "quiet", whose session never ends.
MIGRATIONS = {
    "a migration": _QUICK,
    "a migration that reports what is pinned as dirty": replace(_QUICK, handling=Handling.REPORT_DIRTY),
    "a migration for which KVM dropped all pins": replace(_QUICK, handling=Handling.UNLOCK_RELOCK),
    "a migration that was given up": replace(_QUICK, cancel_round=1, handling=Handling.REPORT_DIRTY),
    "a migration that was given up after KVM had dropped all pins": replace(
        _QUICK, cancel_round=1, handling=Handling.UNLOCK_RELOCK
    ),
    "a post-copy migration": replace(_QUICK, kind=MigrationKind.POSTCOPY),
}


@contextmanager
def _noting_pins_at_the_end(noted: list[int]) -> Iterator[None]:
    """Append how often a page of an SPE buffer is pinned at most when a VM's end comes, before the policy is told of
    it.
    """
    call = driver._Chunk.call

    def noting(self: Any, hook: Hook, lanes: Any) -> None:
        if hook == Hook.VM_DESTROYED:
            words = self.m.host_page[lanes]
            pins = np.where((words & ROLE_MASK) >> ROLE_SHIFT == ROLE_BUFFER, (words & PIN_MASK) // PIN_ONE, 0)
            noted.append(int(pins.max()))
        call(self, hook, lanes)

    with patch.object(driver._Chunk, "call", noting):
        yield


def _held(subject: Subject, scene: Scenario) -> int:
    """Return how often a page of a buffer is pinned at most at the end of a VM of *scene*."""
    noted = [0]
    with _noting_pins_at_the_end(noted):
        subject.run(scene)
    return max(noted)


@check("hooks_run")
def _pins_survive_migration(subject: Subject) -> None:
    """After a migration, done or given up, no page of a buffer is pinned more often than without one."""
    if not subject.virtualized or "quiet" not in subject.scenes:
        return
    scene = subject.scenes["quiet"]
    before = _held(subject, scene)
    for what, migration in MIGRATIONS.items():
        after = _held(subject, replace(scene, migration=migration))
        if after > before:
            raise CheckFailed(
                f"a page is pinned {after} times after {what}, {before} without one. Rule: none is on the target, "
                "and at the source all is that was, unless KVM dropped it. Cause: migration_finished pins beside what "
                "is held. Remedy: unpin_previous() there, or pin only where vcpus.pinned_pages is 0."
            )


@check("hooks_run")
def _pins_end_at_death(subject: Subject) -> None:
    """No page stays pinned when the VMM is killed: in a session, between two, or in a migration."""
    scenes: dict[str, Scenario] = {
        name: scene for name, scene in subject.scenes.items() if name in ("busy", "two vCPUs")
    }
    if subject.virtualized and "quiet" in subject.scenes:
        scenes["quiet, in a migration"] = replace(subject.scenes["quiet"], migration=_QUICK)
    for name, scene in scenes.items():
        for at_ps in (90 * US, 340 * US, 720 * US, 1100 * US):
            left = int(subject.run(scene, duration_ps=at_ps).vm["pinned_pages"].max())
            if left:
                raise CheckFailed(
                    f"in the scene '{name}', {left} pages are still pinned after the VMM was killed at "
                    f"{at_ps // US} us. Cause: pins end with the session, which this one did not. Remedy: call "
                    "vms.unpin_all() in the hook vm_destroyed, whatever the guest was doing."
                )
