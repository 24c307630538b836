"""Policies that prepare all of a VM's memory: what each kind of preparation keeps the host from doing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spepolicy.hookspecs import Cause
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.state import LostCause

from .runs import QUIET, US, every, fresh, quiet, run

MOVING = [HostOp.NUMA_MIGRATE, HostOp.MOVE, HostOp.COMPACT, HostOp.THP, HostOp.KSM, HostOp.NUMA_SCAN, HostOp.FORK]


def test_hide_spe_shows_the_guest_nothing() -> None:
    """No record, no trap, no SPE state to switch; all of the wanted time is black."""
    result = run("hide_spe", quiet())
    t = result.truth
    assert (t["wanted_ps"] > 0).all()
    assert t["active_ps"].sum() == t["selected"].sum() == t["traps"].sum() == t["switch_total_ps"].sum() == 0
    assert (result.blackout_ps[:, :, LostCause.REFUSED] == t["wanted_ps"]).all()


def test_switch_only_hands_the_guest_a_fault_that_it_cannot_repair() -> None:
    """A page that stage 2 lacks: EC 0x25 reaches Linux, which switches SPE off. Where all is mapped it works."""
    result = run("switch_only", quiet())
    t = result.truth
    assert (t["injected_stage2"] > 0).all()
    assert (t["fatal"] == t["injected_stage2"]).all()
    assert t["traps"].sum() == 0
    lucky = run("switch_only", quiet(guest=replace(fresh, buffer_mapped=True))).truth
    assert lucky["stage2_faults"].sum() == 0
    assert (lucky["written"] > 1000).all()


@pytest.mark.parametrize("op", [HostOp.RECLAIM, HostOp.DONTNEED])
def test_a_locked_page_is_neither_reclaimed_nor_discarded(op: HostOp) -> None:
    result = run("mlock_finalize", quiet(host=every(op)))
    assert (result.host_ops[:, op] > 5).all()
    assert result.truth["stage2_faults"].sum() == 0
    assert (result.vm["locked_pages"] == 1024).all()
    assert result.vm["pin_calls"].sum() == 0


@pytest.mark.parametrize("op", [op for op in MOVING if op != HostOp.THP])  # RAM here is too small for huge pages
def test_a_locked_page_moves_like_any_other(op: HostOp) -> None:
    """mlock() promises residence; stage 2 goes, and nothing brings it back for the SPU (P:ec4a346d)."""
    result = run("mlock_finalize", quiet(host=every(op)))
    assert (result.truth["stage2_faults"] > 0).all()
    assert (result.truth["injected_external"] > 0).all()


def test_what_the_memlock_limit_must_allow_is_what_is_pinned_and_what_is_locked() -> None:
    assert (run("mlock_finalize", quiet()).vm["charged_peak_pages"] == 1024).all()
    pinned = run("eager_pin", quiet()).vm
    assert (pinned["charged_peak_pages"] == pinned["pinned_peak_pages"]).all()
    assert (pinned["charged_peak_pages"] > 0).all()
    none = run("copy_buffer", quiet()).vm
    assert (none["charged_peak_pages"] == 0).all()
    assert (none["own_pages"] > 0).all()


def test_a_lock_needs_a_limit_as_large_as_the_vm() -> None:
    low = replace(QUIET, memlock_unlimited=False, memlock_pages=1000)
    result = run("mlock_finalize", quiet(kvm=low), raise_memlock=False)
    assert (result.vm["locked_pages"] == 0).all()
    assert (result.vm["pin_refused"] == 1024).all()


@pytest.mark.parametrize("op", [*MOVING, HostOp.RECLAIM, HostOp.MPROTECT, HostOp.MUNMAP, HostOp.SOFT_DIRTY, HostOp.AGE])
def test_the_host_cannot_touch_a_guest_memfd(op: HostOp) -> None:
    result = run("guest_memfd", quiet(host=every(op)))
    assert (result.host_ops[:, op] > 5).all()
    assert result.truth["stage2_faults"].sum() == result.vm["notifier_calls"].sum() == 0
    assert (result.vm["startup_ps"] > 0).all()


@pytest.mark.parametrize("op", [HostOp.DONTNEED, HostOp.DIRTY_LOG])
def test_a_hole_punch_and_the_dirty_log_reach_a_guest_memfd(op: HostOp) -> None:
    result = run("guest_memfd", quiet(host=every(op)))
    t = result.truth
    assert (t["stage2_faults"] > 0).all()
    assert result.claims[:, Cause.HOST, Cause.HOST].sum() == result.claims.sum()
    assert (t["injected_impdef"] > 0).all()


def test_tables_that_follow_no_notifier_do_not_fault_and_diverge() -> None:
    """VFIO's way: no fault whatever the host does, and records in pages that the VMM no longer shows."""
    where = quiet(host=every(HostOp.DONTNEED, 50 * US))
    vfio, kvm = run("pin_vm", where, follow_notifiers=False), run("pin_vm", where)
    assert vfio.truth["stage2_faults"].sum() == 0
    assert (vfio.truth["diverged_records"] > 0).all()
    assert (kvm.truth["stage2_faults"] > 0).all()
