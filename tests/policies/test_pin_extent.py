"""pin_on_fault's variants, best effort, and mapping without pins: how much a fault brings in, and what the next one
means.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from spepolicy.hookspecs import Cause
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu
from spepolicy.machine.state import LostCause

from .runs import QUIET, US, every, fresh, quiet, run


def test_the_less_a_fault_pins_the_more_faults_come() -> None:
    """AUX pages are scattered, so one range of IPA is hardly more than a page (kvm.md P5b')."""
    faults = {
        extent: run("pin_on_fault", quiet(), extent=extent).truth["stage2_faults"]
        for extent in ("buffer", "walk", "ipa_range")
    }
    assert (faults["buffer"] <= 3).all()
    assert (faults["walk"] >= 8).all()
    assert (faults["ipa_range"] <= faults["walk"]).all()
    assert (faults["ipa_range"] > 2 * faults["buffer"]).all()


def test_one_walk_pins_one_page_and_its_tables() -> None:
    result = run("pin_on_fault", quiet(), extent="walk")
    assert (result.vm["pinned_peak_pages"] == 2 * (1 + 4)).all(), "the new walk is pinned before the old one goes"
    alone = run("pin_on_fault", quiet(), extent="walk", pin_stage1_tables=False)
    assert (alone.vm["pinned_peak_pages"] == 2).all()


def test_a_later_fault_is_repaired_or_ends_the_session() -> None:
    """O. Upton's non-destructive handler against A. Elisei's (kvm.md P5c)."""
    where = quiet(host=every(HostOp.MPROTECT, 200 * US))
    repaired = run("pin_on_fault", where, later_faults="repin").truth
    failed = run("pin_on_fault", where, later_faults="fail").truth
    assert (repaired["stage2_faults"] > 3).all()
    assert repaired["fatal"].sum() == 0
    assert (failed["injected_impdef"] > 0).all()
    assert (failed["written"] < repaired["written"]).all()
    first = run("pin_on_fault", quiet(), later_faults="fail").truth
    assert first["fatal"].sum() == 0, "the first fault of a stretch is no error"


def test_best_effort_goes_on_without_pins_and_fails_at_the_fault() -> None:
    low = replace(QUIET, memlock_unlimited=False, memlock_pages=0)
    mapped = replace(fresh, buffer_mapped=True)
    lucky = run("best_effort_pin", quiet(kvm=low, guest=mapped))
    assert lucky.vm["pin_calls"].sum() == 0
    assert (lucky.vm["pin_refused"] > 0).all()
    assert lucky.truth["refused"].sum() == lucky.truth["fatal"].sum() == 0
    assert (lucky.truth["written"] > 1000).all()
    unlucky = run("best_effort_pin", quiet(kvm=low))
    assert (unlucky.truth["injected_impdef"] > 0).all()
    assert unlucky.claims[:, Cause.NOT_PINNED, Cause.NOT_PINNED].sum() == unlucky.claims.sum() > 0
    assert (unlucky.truth["written"] < lucky.truth["written"]).all()
    room = run("best_effort_pin", quiet())
    assert room.truth["stage2_faults"].sum() == 0


@pytest.mark.parametrize("after", ["resume", "tell"])
def test_map_on_fault_hides_a_cut_record_or_tells(after: str) -> None:
    result = run("map_on_fault", quiet(cpu=Cpu(max_record_bytes=64, align_bytes=4)), after_data_loss=after)
    t = result.truth
    assert (t["data_loss"] > 0).all()
    assert (t["resumed_cut"] > 0).all() == (after == "resume")
    assert (t["injected_impdef"] > 0).all() == (after == "tell")
    assert (result.lost[:, :, LostCause.STAGE2_NOT_PINNED] > 0).all()
