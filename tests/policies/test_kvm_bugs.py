"""Bugs of KVM, injected: what each does, and whether a policy can tell them from a legitimate fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spepolicy.hookspecs import Cause
from spepolicy.judge.attribution import bug_table, confusion, judge_bug
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Bug, Scenario
from spepolicy.machine.state import LostCause

from .runs import MS, QUIET, US, every, fresh, quiet, run

LOOK = {"claims": "look"}
switching = replace(fresh, task_on_ps=200 * US, task_off_ps=60 * US)


def buggy(bug: Bug, rate: float = 0.2, **changes: Any) -> Scenario:
    """Sessions of 200 us, a bug, and whatever the host does."""
    kvm = replace(QUIET, bug=bug, bug_rate_q16=round(rate * 65536))
    return quiet(**({"kvm": kvm, "guest": switching, "duration_ps": 4 * MS} | changes))


def test_a_skipped_page_faults_and_the_judge_knows_why() -> None:
    result = run("eager_pin", buggy(Bug.SKIP_PAGE))
    t = result.truth
    assert t["stage2_faults"].sum() > 3
    matrix = confusion(result)
    assert matrix[:, Cause.KVM_BUG].sum() == matrix.sum()
    assert result.lost[:, :, LostCause.STAGE2_KVM_BUG].sum() == t["stage2_faults"].sum()
    assert (result.vm["pinned_pages"] == 0).all(), "what was not pinned is not unpinned either"
    assert run("eager_pin", buggy(Bug.SKIP_PAGE, 0)).truth["stage2_faults"].sum() == 0


def test_a_page_that_reclaim_took_because_it_was_not_pinned_is_the_bug_s_doing() -> None:
    """Reclaim leaves pinned pages alone. What it unmaps is what KVM had skipped; a NUMA scan unmaps either."""
    mapped = replace(switching, buffer_mapped=True)
    reclaim = buggy(Bug.SKIP_PAGE, guest=mapped, host=every(HostOp.RECLAIM, 50 * US))
    truth = confusion(run("eager_pin", reclaim, pin_stage1_tables=True)).sum(axis=0)
    assert truth[Cause.KVM_BUG] > 0
    scan = buggy(Bug.SKIP_PAGE, guest=mapped, host=every(HostOp.NUMA_SCAN, 50 * US))
    assert confusion(run("eager_pin", scan)).sum(axis=0)[Cause.HOST] > 0


def test_a_leaked_pin_stays_until_the_vm_is_gone_and_eats_the_limit() -> None:
    clean, leaky = run("eager_pin", buggy(Bug.NONE)), run("eager_pin", buggy(Bug.LEAK_PIN))
    assert (leaky.vm["pinned_pages"] > 0).all()
    assert (leaky.vm["pinned_pages"] == leaky.vm["leaked_pins"]).all()
    assert (clean.vm["pinned_pages"] == 0).all()
    assert leaky.truth["stage2_faults"].sum() == 0
    assert judge_bug(leaky).answer == "it makes no fault"
    tight = replace(QUIET, bug=Bug.LEAK_PIN, bug_rate_q16=32768, memlock_unlimited=False, memlock_pages=64)
    starved = run("eager_pin", buggy(Bug.LEAK_PIN, kvm=tight, duration_ps=8 * MS))
    assert (starved.truth["refused"] > 0).all(), "in the end no session can be pinned"


def test_a_missed_notifier_makes_no_fault_and_records_go_astray() -> None:
    drop = every(HostOp.DONTNEED, 50 * US)
    clean = run("map_on_fault", buggy(Bug.NONE, host=drop))
    missed = run(
        "map_on_fault", buggy(Bug.MISSED_NOTIFIER, 1.0, host=drop, guest=replace(switching, buffer_mapped=True))
    )
    assert clean.truth["diverged_records"].sum() == 0
    assert missed.truth["stage2_faults"].sum() == 0
    assert (missed.truth["diverged_records"] > 0).all()
    assert judge_bug(missed).answer == "it makes no fault"


def test_a_bug_that_never_strikes_changes_nothing() -> None:
    """It draws from a stream of its own: guest, samples and host are those of a run without it."""
    host = every(HostOp.NUMA_SCAN, 300 * US)
    for bug in (Bug.SKIP_PAGE, Bug.LEAK_PIN, Bug.MISSED_NOTIFIER):
        clean, idle = (run("pin_on_fault", buggy(kind, 0, host=host)) for kind in (Bug.NONE, bug))
        assert (idle.vm["bug_draws"] > 0).all()
        assert np.array_equal(clean.truth, idle.truth)
        assert np.array_equal(clean.host_ops, idle.host_ops)


@pytest.mark.parametrize(
    ("name", "fields", "answer"),
    [
        ("eager_pin", {}, "no"),
        ("eager_pin", LOOK, "yes"),
        ("best_effort_pin", {}, "no"),
        ("best_effort_pin", LOOK, "yes"),
        ("pin_while_enabled", {"notifiers": "honour"}, "no"),
        ("pin_while_enabled", LOOK | {"notifiers": "honour"}, "yes"),
        ("pin_cache", {"notifiers": "honour"}, "no"),
        ("pin_cache", LOOK | {"notifiers": "honour"}, "yes"),
        ("pin_on_fault", {}, "no"),
        ("pin_on_fault", LOOK, "yes"),
        ("synthetic_fault", {}, "no"),
        ("synthetic_fault", LOOK, "yes"),
        ("pin_vm", {}, "no"),
        ("map_on_fault", {}, "it did not strike"),
        ("switch_only", {}, "it did not strike"),
        ("guest_memfd", {}, "it did not strike"),
        ("copy_buffer", {}, "it did not strike"),
    ],
)
def test_can_a_kvm_bug_be_told_from_a_legitimate_fault(name: str, fields: dict[str, Any], answer: str) -> None:
    """A skipped page, and a host that scans for NUMA balancing now and then.

    A policy that only assumes cannot tell (A. Elisei, 9 Aug 2022); one that looks at its list of pinned pages and at
    what its notifier handler did can. One that pins nothing has no such bug.
    """
    where = buggy(Bug.SKIP_PAGE, host=every(HostOp.NUMA_SCAN, 400 * US), duration_ps=6 * MS)
    result = run(name, where, **fields)
    verdict = judge_bug(result)
    assert verdict.answer == answer, verdict
    if answer != "it did not strike":
        assert verdict.by_bug >= 5
    if answer == "yes":
        assert verdict.faults > verdict.by_bug, "there were legitimate faults to confuse it with"
    (_, row) = bug_table({name: verdict})
    assert row.startswith(f"{name} ")
    assert f" {answer} " in row


def test_what_kvm_cannot_see_it_cannot_tell() -> None:
    """A skipped page was mapped all the same, until reclaim took it: a notifier did that, and KVM blames the host."""
    mapped = replace(switching, buffer_mapped=True)
    where = buggy(Bug.SKIP_PAGE, guest=mapped, host=every(HostOp.RECLAIM, 50 * US))
    result = run("eager_pin", where, pin_stage1_tables=True, **LOOK)
    matrix = confusion(result)
    assert matrix[Cause.HOST, Cause.KVM_BUG] > 0
    assert judge_bug(result).answer == "no"
