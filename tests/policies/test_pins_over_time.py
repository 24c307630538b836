"""When pins come and go: while the buffer is enabled (v6), kept in a cache (January 2026), or for an announced ring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from spepolicy.errors import UnsupportedPolicyError
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.state import LostCause
from spepolicy.testing.lives import MIGRATIONS

from .runs import MS, QUIET, US, every, fresh, quiet, run

switching = replace(fresh, task_on_ps=200 * US, task_off_ps=100 * US)
calling = replace(switching, paravirtual=True)
CACHES = [
    {"key": key, "release": release, "release_after_us": 50}
    for key in ("range", "registers")
    for release in ("need", "timer", "ageing")
]


# ---- while enabled ---------------------------------------------------------------------------------------------------


def test_v6_pins_at_each_enable_and_nothing_while_disabled() -> None:
    result = run("pin_while_enabled", quiet(guest=switching, duration_ps=4 * MS))
    t, vm = result.truth, result.vm
    assert t["stage2_faults"].sum() == 0
    assert (vm["pin_calls"] >= 4 * t["sessions"].sum(axis=1)).all()
    mean = vm["pinned_page_ps"] * 1000 / result.host_elapsed_ps
    assert (mean < 0.9 * vm["pinned_peak_pages"]).all()


def test_v6_serves_el0_sessions_and_pins_tables() -> None:
    user_only = run("pin_while_enabled", quiet(guest=replace(switching, profile_kernel=False)))
    assert user_only.truth["stage2_faults"].sum() == 0
    assert (user_only.truth["written"] > 100).all()
    with_tables, without = (
        run("pin_while_enabled", quiet(guest=switching), pin_stage1_tables=tables) for tables in (True, False)
    )
    assert (with_tables.vm["pin_calls"] > without.vm["pin_calls"]).all()


def test_v6_caps_the_buffer_with_bsc_4() -> None:
    """Linux has no case for BSC 4: the session dies, and says so only because of nothing (no DL)."""
    result = run("pin_while_enabled", quiet(guest=switching), max_buffer_KiB=16)
    t = result.truth
    assert t["written"].sum() == 0
    assert (t["fatal"] > 0).all()
    assert (result.blackout_ps[:, :, LostCause.REFUSED] > 0).all()
    assert (run("pin_while_enabled", quiet(guest=switching), max_buffer_KiB=0).truth["written"] > 0).all()


def test_v6_over_the_limit_tells_the_guest_or_asks_the_vmm() -> None:
    low = replace(QUIET, memlock_unlimited=False, memlock_pages=4)
    told = run("pin_while_enabled", quiet(guest=switching, kvm=low))
    raised = run("pin_while_enabled", quiet(guest=switching, kvm=low), over_limit="vmm_raises")
    assert told.truth["written"].sum() == 0
    assert (told.vm["pin_refused"] > 0).all()
    assert (raised.truth["written"] > 100).all()
    assert (raised.vm["pinned_peak_pages"] > 4).all()
    assert (raised.truth["hook_total_ps"] >= raised.truth["sessions"] * raised.scenario.costs.vmm_exit_ps).all()


def test_the_finer_filter_ignores_what_leaves_the_page_in_place() -> None:
    for op, faults in ((HostOp.NUMA_SCAN, False), (HostOp.MPROTECT, False), (HostOp.SOFT_DIRTY, False),
                       (HostOp.KSM, True), (HostOp.DONTNEED, True)):  # fmt: skip
        result = run("pin_while_enabled", quiet(guest=switching, host=every(op, 50 * US), duration_ps=4 * MS))
        assert (result.truth["stage2_faults"].sum() > 0) == faults, op
        assert result.truth["diverged_records"].sum() == 0, op
        every_event = run("pin_while_enabled", quiet(guest=switching, host=every(op, 50 * US)), notifiers="honour")
        assert every_event.truth["stage2_faults"].sum() > 0, op


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", CACHES, ids=lambda fields: f"{fields['key']}-{fields['release']}")
def test_a_cache_pins_less_often_than_v6_and_leaks_nothing(fields: dict[str, object]) -> None:
    where = quiet(guest=switching, duration_ps=4 * MS)
    cached, v6 = run("pin_cache", where, **fields), run("pin_while_enabled", where)
    assert cached.truth["stage2_faults"].sum() == 0
    assert cached.vm["pin_calls"].sum() <= v6.vm["pin_calls"].sum()
    assert (cached.vm["pinned_pages"] == 0).all()


def test_a_range_hits_where_registers_do_not() -> None:
    """Linux programs another PTR and LIMIT at each start, in the same ring."""
    where = quiet(guest=switching, duration_ps=6 * MS)
    by_range, by_registers = (run("pin_cache", where, key=key) for key in ("range", "registers"))
    sessions = by_range.truth["sessions"].sum(axis=1)
    assert (sessions > 10).all()
    assert (by_range.vm["pin_calls"] <= 16 + 3 * 4).all(), "the whole ring once, in up to three stretches with tables"
    assert (by_registers.vm["pin_calls"] > 2 * by_range.vm["pin_calls"]).all()


def test_pins_go_some_time_after_the_buffer_was_disabled() -> None:
    """need: never; ageing: after two idle ticks; timer: one period after the disable."""
    idle = replace(fresh, task_on_ps=100 * US, task_off_ps=500 * US)
    where = quiet(guest=idle, duration_ps=6 * MS)
    mean = {}
    for release in ("need", "ageing", "timer"):
        result = run("pin_cache", where, release=release, release_after_us=60)
        mean[release] = result.vm["pinned_page_ps"].sum()
        assert result.truth["stage2_faults"].sum() == 0, release
    v6 = run("pin_while_enabled", where).vm["pinned_page_ps"].sum()
    assert mean["need"] > mean["ageing"] > mean["timer"] > v6


def test_a_cache_grows_no_further_than_its_cap() -> None:
    capped = run("pin_cache", quiet(guest=switching, duration_ps=4 * MS), max_pinned_KiB=32, pin_stage1_tables=False)
    free = run("pin_cache", quiet(guest=switching, duration_ps=4 * MS), pin_stage1_tables=False)
    assert (free.vm["pinned_peak_pages"] == 16).all()
    assert (capped.vm["pin_calls"] > free.vm["pin_calls"]).all()


def test_at_need_the_idle_pins_of_other_vcpus_go() -> None:
    """Two vCPUs, a limit that holds one set: v6's sets never overlap in the idle task's time, the cache gives way."""
    tight = replace(QUIET, memlock_unlimited=False, memlock_pages=26)
    idle = replace(fresh, vcpus=2, task_on_ps=100 * US, task_off_ps=400 * US)
    result = run("pin_cache", quiet(guest=idle, kvm=tight, duration_ps=6 * MS))
    assert (result.vm["pin_refused"] > 0).all(), "the limit was met"
    assert (result.truth["written"] > 100).all(), "and yet both vCPUs profile"
    assert (result.vm["pinned_peak_pages"] <= 26).all()


def test_a_stale_cache_faults_when_the_ring_is_new() -> None:
    """New AUX pages behind the same VA: KVM holds the old ones, and the host may take the new (kvm.md P9)."""
    renewing = replace(switching, renew_ps=400 * US)
    where = quiet(guest=renewing, host=every(HostOp.RECLAIM, 50 * US), duration_ps=6 * MS)
    cached = run("pin_cache", where)
    assert (cached.truth["stage2_faults"] > 0).all()
    assert cached.truth["fatal"].sum() == 0, "with DL=0 it pins anew"
    assert run("pin_while_enabled", where).truth["stage2_faults"].sum() == 0
    one_ring = quiet(guest=switching, host=every(HostOp.RECLAIM, 50 * US), duration_ps=6 * MS)
    assert run("pin_cache", one_ring).truth["stage2_faults"].sum() == 0


# ---- announced rings -------------------------------------------------------------------------------------------------


def test_an_announced_ring_is_pinned_once() -> None:
    result = run("paravirtual", quiet(guest=calling, duration_ps=4 * MS))
    t = result.truth
    assert t["stage2_faults"].sum() == t["fatal"].sum() == 0
    assert (t["announced"] == 1).all()
    assert (t["sessions"] > 5).all()
    assert (result.vm["pin_calls"] == 16 + 4).all()
    renewed = run("paravirtual", quiet(guest=replace(calling, renew_ps=400 * US), duration_ps=4 * MS))
    assert (renewed.truth["announced"] > 1).all()
    assert renewed.truth["stage2_faults"].sum() == 0
    assert (renewed.vm["pin_calls"] == 20 * renewed.truth["announced"].sum(axis=1)).all()


def test_a_guest_that_does_not_call_is_not_served() -> None:
    with pytest.raises(UnsupportedPolicyError, match=r"announces no buffer \(guest.paravirtual=false\)"):
        run("paravirtual", quiet(guest=switching))


def test_an_announced_ring_over_the_limit_is_refused_when_it_is_used() -> None:
    low = replace(QUIET, memlock_unlimited=False, memlock_pages=8)
    result = run("paravirtual", quiet(guest=calling, kvm=low))
    assert (result.truth["refused"] > 0).all()
    assert result.truth["written"].sum() == 0


def test_a_limit_that_holds_one_ring_need_not_hold_two() -> None:
    """Each perf session announces a ring of 16 pages with its tables; the ring before is gone by then."""
    one = replace(QUIET, memlock_unlimited=False, memlock_pages=24)
    renewing = replace(calling, renew_ps=400 * US)
    result = run("paravirtual", quiet(guest=renewing, kvm=one, duration_ps=4 * MS))
    assert (result.truth["announced"] > 1).all()
    assert (result.vm["pin_refused"] == 0).all()
    assert (result.vm["pin_calls"] == 20 * result.truth["announced"].sum(axis=1)).all()


# ---- migration -------------------------------------------------------------------------------------------------------


# A write-protected page of the source is a fault of its own (kvm.md L1), and so is one that KVM has let go: here pins
# are reported dirty, or nothing is protected.
UNPROTECTED = [what for what in MIGRATIONS if "dirty" in what or what.endswith("given up") or "post-copy" in what]


@pytest.mark.parametrize("what", UNPROTECTED)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("pin_while_enabled", {}),
        ("eager_pin", {"pin_stage1_tables": True}),
        ("best_effort_pin", {"pin_stage1_tables": True}),
        ("paravirtual", {}),
        *(("pin_cache", cache) for cache in CACHES),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_a_migration_costs_the_profile_no_fault(name: str, fields: dict[str, Any], what: str) -> None:
    """KVM_SET_ONE_REG on the target enables what was enabled, so that its buffer is pinned before the guest runs."""
    where = quiet(guest=calling)
    result = run(name, replace(where, migration=MIGRATIONS[what]), **fields)
    assert result.truth["stage2_faults"].sum() == 0
    assert result.truth["refused"].sum() == 0
    assert result.truth["fatal"].sum() == 0
    assert (result.vm["pinned_pages"] == 0).all()  # after the VM's end
    if "given up" in what and name == "paravirtual":
        calls = run(name, where, **fields).vm["pin_calls"]
        assert (result.vm["pin_calls"] == calls).all()  # what is held is not pinned twice


# ---- the user picks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("want", "same"),
    [("cheap_fast", "best_effort_pin"), ("fast_reliable", "pin_vm"), ("cheap_reliable", "pin_while_enabled")],
)
@pytest.mark.parametrize("what", [None, *MIGRATIONS])
def test_a_choice_is_the_policy_that_it_stands_for(want: str, same: str, what: str | None) -> None:
    where = quiet(guest=switching, host=every(HostOp.NUMA_SCAN, 300 * US))
    if what is not None:
        where = replace(where, migration=MIGRATIONS[what])
    chosen, plain = run("user_choice", where, want=want), run(same, where)
    for field in ("digest", "stage2_faults", "hook_total_ps", "kept"):
        assert (chosen.truth[field] == plain.truth[field]).all(), field
    assert (chosen.vm["pin_calls"] == plain.vm["pin_calls"]).all()
    assert (chosen.claims == plain.claims).all()
