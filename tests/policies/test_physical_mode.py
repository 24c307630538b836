"""Physical addresses for the SPU (FEAT_SPE_nVM): what KVM saves, what it cannot see, and guests that do not use it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spepolicy.errors import UnsupportedPolicyError
from spepolicy.machine.guestacts import GuestAct, Moment
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu, Guest, Handling, Migration, MigrationKind
from spepolicy.machine.state import LostCause

from ..properties.scenarios import conserved
from .runs import MS, QUIET, US, every, fresh, quiet, run

NVM = Cpu(features=("nVM",))
knows = replace(fresh, physical_buffer=True, task_on_ps=200 * US, task_off_ps=60 * US)
unaware = replace(knows, physical_buffer=False)


def test_it_needs_the_feature() -> None:
    with pytest.raises(UnsupportedPolicyError, match="FEAT_SPE_nVM"):
        run("physical_mode", quiet(guest=knows))
    assert run("physical_mode", quiet(guest=knows, cpu=Cpu(spe_version=6))).truth["written"].sum() > 100


def test_no_walk_no_table_no_fault() -> None:
    where = quiet(guest=knows, cpu=NVM, duration_ps=4 * MS)
    result, v6 = run("physical_mode", where), run("pin_while_enabled", where)
    t = result.truth
    assert t["stage2_faults"].sum() == t["stage1_faults"].sum() == 0
    assert conserved(result).all()
    costs = where.costs
    paid = result.vm["pin_calls"] * (costs.pin_page_ps + costs.unpin_page_ps) + result.vm["stage2_maps"] * (
        costs.map_page_ps
    )
    assert (t["hook_total_ps"].sum(axis=1) <= paid).all(), "pins, unpins and maps, and nothing for walks"
    assert (result.vm["pinned_peak_pages"] <= 17).all(), "the ring, and what overlaps: no table"
    assert (v6.vm["pin_calls"] > 5 * result.vm["pin_calls"]).all()
    assert (result.vm["pinned_pages"] == 0).all()


def test_the_guest_without_nvm_is_walked_as_by_v6() -> None:
    where = quiet(guest=unaware, cpu=NVM, duration_ps=4 * MS)
    result, v6 = run("physical_mode", where), run("pin_while_enabled", where)
    np.testing.assert_array_equal(result.truth["hook_total_ps"], v6.truth["hook_total_ps"])
    np.testing.assert_array_equal(result.truth["digest"], v6.truth["digest"])
    np.testing.assert_array_equal(result.vm["pin_calls"], v6.vm["pin_calls"])


def test_unpin_at_disable_holds_nothing_between_sessions() -> None:
    where = quiet(guest=replace(knows, task_on_ps=100 * US, task_off_ps=500 * US), cpu=NVM, duration_ps=6 * MS)
    kept, dropped = run("physical_mode", where), run("physical_mode", where, unpin="at_disable")
    assert (dropped.vm["pinned_page_ps"] < kept.vm["pinned_page_ps"] // 2).all()
    assert (dropped.vm["pin_calls"] > kept.vm["pin_calls"]).all()
    assert dropped.truth["stage2_faults"].sum() == 0


def test_new_rings_are_followed() -> None:
    where = quiet(guest=replace(knows, renew_ps=400 * US), host=every(HostOp.RECLAIM, 50 * US), cpu=NVM,
                  duration_ps=6 * MS)  # fmt: skip
    result = run("physical_mode", where)
    assert result.truth["stage2_faults"].sum() == 0, "its registers name them"
    assert run("pin_cache", where).truth["stage2_faults"].sum() > 0, "a cache of virtual ranges goes stale"


def test_what_a_notifier_takes_is_pinned_again() -> None:
    where = quiet(guest=replace(knows, task_on_ps=100 * MS, task_off_ps=0), host=every(HostOp.DONTNEED), cpu=NVM)
    result = run("physical_mode", where)
    t = result.truth
    assert (t["stage2_faults"] > 0).any()
    assert t["fatal"].sum() == 0
    assert conserved(result).all()
    assert result.lost[:, :, LostCause.STAGE2_HOST].sum() > 0


def test_a_guest_that_moves_its_pages_loses_records_without_a_fault() -> None:
    acts = ((int(GuestAct.REMAP), 100 * US, 0, int(Moment.ANY), 1, 4),)
    result = run("physical_mode", quiet(guest=replace(knows, acts=acts), cpu=NVM))
    t = result.truth
    assert t["acts"].sum() > 10
    assert t["stage2_faults"].sum() == 0
    assert (t["stray_records"] > 0).all()
    followed = run("map_on_fault", quiet(guest=replace(knows, acts=acts), cpu=NVM))
    assert followed.truth["stage2_faults"].sum() > 0


def test_a_memlock_limit_below_the_ring_is_told() -> None:
    low = replace(QUIET, memlock_unlimited=False, memlock_pages=8)
    result = run("physical_mode", quiet(guest=knows, cpu=NVM, kvm=low))
    assert (result.truth["refused"] > 0).all()
    assert (result.vm["pinned_peak_pages"] <= 8).all()


moving = Migration(MigrationKind.PRECOPY, Handling.REPORT_DIRTY, start_ps=500 * US, switch_ps=50 * US,
                   max_downtime_ps=10 * MS, rounds=3)  # fmt: skip


@pytest.mark.parametrize("who", [knows, unaware], ids=["nVM", "no nVM"])
def test_a_migration_that_is_given_up_needs_no_memory_for_a_second_pin(who: Guest) -> None:
    """The limit is what the guest needs without one; few samples, so that all of its buffer is still to be written."""
    alone = quiet(guest=replace(who, task_on_ps=100 * MS, period_ops=1_000_000), cpu=NVM, duration_ps=20 * MS)
    needed = int(run("physical_mode", alone).vm["pinned_peak_pages"].max())
    low = replace(QUIET, memlock_unlimited=False, memlock_pages=needed)
    result = run("physical_mode", replace(alone, kvm=low, migration=replace(moving, cancel_round=1)))
    assert (result.vm["migration_outcome"] == 2).all()
    assert result.vm["pin_refused"].sum() == 0
    assert result.truth["stage2_faults"].sum() == 0


def test_it_survives_a_migration() -> None:
    result = run("physical_mode", quiet(guest=knows, cpu=NVM, migration=moving, duration_ps=20 * MS))
    assert (result.vm["migration_outcome"] == 1).all()
    assert result.truth["stage2_faults"].sum() == 0
    assert (result.vm["migration_unlogged"] == 0).all()
    assert (result.vm["pinned_pages"] == 0).all()
