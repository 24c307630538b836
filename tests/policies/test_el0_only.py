"""{E0SPE,E1SPE} = {1,0}: profiling begins by an ERET that KVM does not see. What each treatment does about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spepolicy.errors import UnsupportedPolicyError
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.state import LostCause

from .runs import FGT, MS, US, every, fresh, quiet, run

user_only = replace(fresh, profile_kernel=False)


@pytest.mark.parametrize("treatment", ["documentation", "e0spe", "erratum", "eret_once", "eret_always"])
def test_pinned_before_the_first_record_there_is_nothing_to_fault(treatment: str) -> None:
    result = run("eager_pin", quiet(guest=user_only, cpu=FGT), el0_only=treatment)
    assert result.truth["stage2_faults"].sum() == 0
    assert (result.truth["written"] > 100).all()
    assert (result.vm["pin_calls"] > 0).all()


@pytest.mark.parametrize("treatment", ["documentation", "first_fault", "e0spe", "erratum", "eret_once"])
def test_a_session_that_profiles_el1_needs_no_treatment(treatment: str) -> None:
    treated, plain = (run("eager_pin", quiet(cpu=FGT), el0_only=how) for how in (treatment, "error"))
    assert (treated.truth["digest"] == plain.truth["digest"]).all()
    assert treated.truth["eret_traps"].sum() == 0


def test_an_unpinned_session_faults_once_or_fails() -> None:
    fault = run("eager_pin", quiet(guest=user_only), el0_only="first_fault")
    assert (fault.blackout_ps[:, :, LostCause.STAGE2_NOT_PINNED] > 0).all()
    assert fault.truth["fatal"].sum() == 0
    assert (run("eager_pin", quiet(guest=user_only), el0_only="error").truth["fatal"] > 0).all()


def test_the_one_shot_trap_costs_one_eret_and_the_other_all() -> None:
    """Linux enters EL0 after every system call: trapping all ERETs is what was rejected (P:71ed45ca)."""
    where = quiet(guest=replace(user_only, buffer_pages=512), cpu=FGT)
    once, always = (run("eager_pin", where, el0_only=f"eret_{how}") for how in ("once", "always"))
    assert (once.truth["eret_traps"] == 1).all()
    assert (always.truth["eret_traps"] > 20).all()
    extra = always.truth["trap_total_ps"] - once.truth["trap_total_ps"]
    assert (extra == (always.truth["eret_traps"] - 1) * where.costs.trap_ps).all()
    assert (always.truth["hook_total_ps"] > once.truth["hook_total_ps"]).all(), "each pins the whole buffer again"


@pytest.mark.parametrize("treatment", ["eret_once", "eret_always"])
def test_trapping_eret_needs_a_machine_that_can(treatment: str) -> None:
    with pytest.raises(UnsupportedPolicyError, match=r"FEAT_FGT \(cpu.fine_grained_traps=false\)"):
        run("eager_pin", quiet(guest=user_only), el0_only=treatment)


def test_a_broken_rule_is_answered_as_the_treatment_says() -> None:
    """A fault behind the pins' back: an event with DL, an SError-like abort, or pinned again."""
    where = quiet(guest=user_only, host=every(HostOp.NUMA_SCAN, 300 * US), duration_ps=3 * MS)
    told = {how: run("eager_pin", where, el0_only=how).truth for how in ("documentation", "erratum", "e0spe")}
    assert (told["documentation"]["injected_impdef"] > 0).all()
    assert told["documentation"]["injected_external"].sum() == 0
    assert (told["erratum"]["injected_external"] > 0).all()
    assert told["e0spe"]["fatal"].sum() == 0
    assert (told["e0spe"]["stage2_faults"] > 0).all()
