"""The author's kit: each check catches the fault that it is for, and says by name what is wrong."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from spepolicy import batch
from spepolicy.batch import Vcpus, Vms
from spepolicy.errors import ConfigurationError
from spepolicy.hookspecs import Event, Trap, doc, hookimpl
from spepolicy.plugins import build_policy, installed_policies
from spepolicy.testing import CHECKS, check_policy
from spepolicy.testing.scenes import SCENES
from spepolicy.testing.subject import Subject, differences


@dataclass
class Good:
    """Pin the buffer when profiling becomes enabled, through public hooks only: what `eager_pin` does by default.

    Mechanism: the same.
    Source: the test.
    Needs: nothing.
    Costs: the same.
    Fails: where that fails.
    """

    tables: bool = field(default=False, metadata=doc("pin the guest's stage 1 tables too"))

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        self.pin(vcpus)

    def pin(self, vcpus: Vcpus) -> None:
        walk = vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi, pin_tables=self.tables)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        for refused in (pinned.over_limit, pinned.no_page):
            refused.inject(Event.IMPDEF, data_loss=True)
        pinned.ok.unpin_previous()

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.IMPDEF, data_loss=True)


def statuses(policy: object, **expected: str) -> dict[str, str]:
    return {outcome.check: outcome.status for outcome in check_policy(policy, expected_failures=expected)}


def message(policy: object, check: str) -> str:
    outcome = check_policy(policy, only=[check])[-1]
    assert outcome.check == check
    assert outcome.status == "failed", outcome
    return outcome.message


def test_a_good_policy_passes_every_check() -> None:
    assert set(statuses(Good()).values()) == {"passed"}


# ---- broken policies, one for each check -----------------------------------------------------------------------------


@dataclass
class NamedLikeAHook(Good):
    __doc__ = Good.__doc__

    def buffer_enabled(self, vcpus: Vcpus) -> None:
        """Not marked."""


@dataclass
class Terse(Good):
    """Pin the buffer.

    Mechanism: pins.
    """


@dataclass
class Undescribed(Good):
    __doc__ = Good.__doc__
    pages: int = field(default=1, metadata=doc("pages to pin"))


@dataclass
class Floating(Good):
    __doc__ = Good.__doc__
    State = np.dtype([("mean", "f8")])


@dataclass
class WrongShape(Good):
    __doc__ = Good.__doc__

    def pin(self, vcpus: Vcpus) -> None:
        vcpus.walk_stage1(vcpus.buffer_lo[:1], vcpus.buffer_hi).ok.pin().ok.unpin_previous()


@dataclass
class Silent(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.where(faults.data_loss).inject(Event.IMPDEF)


@dataclass
class LooseErrata(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def errata(self) -> Any:
        return [{"id": "X"}]


@dataclass
class Dice(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        if random.random() < 0.5:
            self.pin(vcpus)


@dataclass
class Remembers(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        calls = self.__dict__.setdefault("calls", [])
        calls.append(len(vcpus))
        if len(calls) < 50:
            self.pin(vcpus)


@dataclass
class AllOrNothing(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        if len(vcpus) > 1:
            self.pin(vcpus)


@dataclass
class Peeks(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        truth = batch._live[vcpus._ticket]._machine.truth
        self.pin(vcpus.where(truth["written"][vcpus._lanes, vcpus._vcpus] < 500))


@dataclass
class Tampers(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        batch._live[vcpus._ticket]._machine.truth["collided"][vcpus._lanes, vcpus._vcpus] += 1
        self.pin(vcpus)


@dataclass
class KeepsItsPins(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        pass


@dataclass
class Hoards(Good):
    __doc__ = Good.__doc__

    def pin(self, vcpus: Vcpus) -> None:
        vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi).ok.pin()


@dataclass
class Privileged(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        vms.pin_all(ignore_limit=True)


@dataclass
class OldNews(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.EXTERNAL_ABORT)


@dataclass
class HidesTheCut(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        walk = faults.walk_stage1(faults.buffer_lo, faults.buffer_hi, pin_tables=True)
        walk.failed.inject(Event.STAGE1_ABORT)
        good = walk.ok
        mapped = good.map()
        good.where(mapped).resume()
        good.where(~mapped).inject(Event.IMPDEF)


@dataclass
class OnlyResumes(Good):
    __doc__ = Good.__doc__

    @hookimpl
    def traps(self) -> Trap:
        return Trap.NONE

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.resume()


@dataclass
class PinsTwiceAfterMigration(Good):
    """It pins for the target, and does not say what becomes of the set before, which a given-up migration leaves."""

    __doc__ = Good.__doc__

    @hookimpl
    def migration_finished(self, vcpus: Vcpus) -> None:
        enabled = vcpus.where(vcpus.pmblimitr & 1 != 0)
        enabled.walk_stage1(enabled.buffer_lo, enabled.buffer_hi).ok.pin()


@dataclass
class LetsGoAtDisable(Good):
    """Each session ends with an unpin, as if every VM ended its sessions."""

    __doc__ = Good.__doc__

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        vcpus.unpin()

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        pass


@dataclass
class BlindToTheVersion(Good):
    """In no scene of the kit it faults where an external abort is forbidden; the catalogue has such a case."""

    __doc__ = Good.__doc__

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.EXTERNAL_ABORT, data_loss=True)


@pytest.mark.parametrize(
    ("policy", "check", "says"),
    [
        (NamedLikeAHook(), "contract", "buffer_enabled is named like a hook but not marked"),
        (Terse(), "docstring", "lacks Source, Needs, Costs, Fails"),
        (Undescribed(), "fields", "field pages is a number without unit"),
        (Floating(), "state", "State field mean has dtype float64"),
        (WrongShape(), "hooks_run", r"walk_stage1\(lo\) has shape \(1,\)"),
        (Silent(), "hooks_run", "without an answer"),
        (LooseErrata(), "errata_hook", "errata.. returned {'id': 'X'}"),
        (Dice(), "determinism", "a second run differs"),
        (Remembers(), "determinism", "memory outside vcpus.state"),
        (AllOrNothing(), "batch_independence", "decision for the batch as a whole"),
        (Peeks(), "no_ground_truth", "sees what KVM would see"),
        (Tampers(), "conservation", "samples are unaccounted for"),
        (KeepsItsPins(), "pins_end_with_the_vm", "vms.unpin_all"),
        (Hoards(), "pins_end_with_the_session", "unpin_previous"),
        (Privileged(), "memlock", "1024 pages were pinned or locked under a limit of"),
        (OldNews(), "allowed_events", "PMSVer=4"),
        (HidesTheCut(), "no_silent_cut", r"PMBSR_EL1.DL=1 were resumed"),
        (OnlyResumes(), "progress", r"resume\(\) without a mapping"),
        (PinsTwiceAfterMigration(), "pins_survive_migration", "pinned 2 times after a migration.*unpin_previous"),
        (LetsGoAtDisable(), "pins_end_at_death", "after the VMM was killed at"),
        (BlindToTheVersion(), "catalogue", r"A7: tells external, which is forbidden.*task=catalogue"),
    ],
)
def test_each_check_catches_its_fault_by_name(policy: object, check: str, says: str) -> None:
    random.seed(1)
    text = message(policy, check)
    assert re.search(says, text), text
    assert re.search(r"Remedy|Decorate it|report it", text), "the likely fix"


def test_every_check_has_a_broken_policy() -> None:
    (mark,) = test_each_check_catches_its_fault_by_name.pytestmark  # type: ignore[attr-defined]
    assert {row[1] for row in mark.args[1]} == set(CHECKS)


# ---- declared failures -----------------------------------------------------------------------------------------------


def test_a_declared_failure_is_expected_and_its_absence_is_reported() -> None:
    reason = {"memlock": "it has CAP_IPC_LOCK"}
    for policy, status in ((Privileged(), "expected"), (Good(), "unexpected pass")):
        outcomes = check_policy(policy, expected_failures=reason, only=["memlock"])
        assert [(outcome.check, outcome.status) for outcome in outcomes] == [
            ("contract", "passed"), ("hooks_run", "passed"), ("memlock", status),
        ]  # fmt: skip


def test_only_what_exists_can_be_chosen() -> None:
    with pytest.raises(ConfigurationError, match=r"no check.*Did you mean 'memlock'"):
        check_policy(Good(), only=["memlok"])


@pytest.mark.parametrize(
    ("expected", "says"), [({"memlok": "x"}, "Did you mean 'memlock'"), ({"memlock": " "}, "has no reason")]
)
def test_a_declaration_needs_a_check_and_a_reason(expected: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check_policy(Good(), expected_failures=expected)


def test_checks_of_behaviour_are_not_run_on_a_broken_contract() -> None:
    after = statuses(NamedLikeAHook())
    assert after["contract"] == "failed"
    assert {status for check, status in after.items() if check != "contract"} == {"not run"}


def test_the_policy_itself_is_not_changed() -> None:
    policy = Remembers()
    check_policy(policy)
    assert vars(policy) == {"tables": False}


# ---- the shipped policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("scene", SCENES)
def test_a_loopback_of_eager_pin_is_equal_to_the_bit(scene: str, tables: bool) -> None:
    """The shipped policy has no door of its own: public hooks do the same."""
    shipped = Subject(build_policy("eager_pin", {"pin_stage1_tables": tables}))
    loopback = Subject(Good(tables))
    first, second = shipped.result(scene), loopback.result(scene)
    # Only the shipped one claims causes, for the judge; what it answers is the same.
    assert set(differences(first, second)) <= {"claims", "vcpu"}
    for result in (first, second):
        result.vcpu["claim"] = 0
    assert np.array_equal(first.vcpu, second.vcpu)


def test_scenes_and_checks_are_named_in_the_message_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from spepolicy.testing.__main__ import main

    assert main(["--list"]) == 0
    assert set(CHECKS) == {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert main(["no_such_policy"]) == 2
    assert "not installed" in capsys.readouterr().err


def test_the_deep_copy_keeps_fields() -> None:
    assert Subject(replace(Good(), tables=True)).policy == Good(True)
    assert installed_policies()


@dataclass
class Picky(Good):
    __doc__ = Good.__doc__
    wants: str = field(default="paravirtual", metadata=doc("what it needs"))

    @hookimpl
    def supports(self, platform: Any) -> str | None:
        return None if self.wants == "paravirtual" and platform.paravirtual_guest else f"it needs {self.wants}"


def test_a_policy_that_needs_a_feature_is_tested_on_a_machine_with_it() -> None:
    assert set(statuses(Picky()).values()) == {"passed"}
    assert "refuses every scene of the kit: it needs luck" in message(Picky(wants="luck"), "hooks_run")
