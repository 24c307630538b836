"""Each shipped policy does what its docstring says it does, and fails where it says it fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.hookspecs import Cause
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu, Host, HostKind, Scenario
from spepolicy.machine.state import LostCause

from ..properties.scenarios import MS, POLICIES, QUIET, US, busy_host, guest, policy, scenario

LANES = 6
PINNING = ("eager_pin", "pin_on_fault", "synthetic_fault")

# A guest whose AUX pages stage 2 does not map, and whose perf reads at once: the only faults are those of the policy.
fresh = guest(buffer_mapped=False, buffer_pages=16, task_on_ps=100 * MS, task_off_ps=0, reader_latency_ps=US,
              reader_bytes_per_us=10**6)  # fmt: skip


def every(op: HostOp, interval_ps: int = 100 * US) -> Host:
    """A host that does one thing to all memory now and then."""
    return Host(kind=HostKind.RANDOM, random_ops=((int(op), interval_ps, 1024),))


def quiet(**changes: Any) -> Scenario:
    return scenario(**({"kvm": QUIET, "guest": fresh, "duration_ps": 2 * MS} | changes))


def run(name: str, where: Scenario, **fields: Any) -> Result:
    return simulate(where, policy(name, **fields), name=name, replicates=range(LANES), threads=1)


def test_no_policy_leaks_a_pin_or_exceeds_the_limit() -> None:
    for name in POLICIES:
        result = run(name, scenario(host=busy_host(), duration_ps=2 * MS))
        assert (result.vm["pinned_pages"] == 0).all(), name
        if name != "pin_vm":
            assert (result.vm["pinned_peak_pages"] <= result.scenario.kvm.memlock_pages).all(), name
        assert (result.vm["pinned_peak_pages"] > 0).any() == (name in (*PINNING, "pin_vm")), name


# ---- pin_vm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [HostOp.RECLAIM, HostOp.NUMA_MIGRATE, HostOp.COMPACT, HostOp.THP, HostOp.AGE])
def test_pin_vm_is_safe_from_what_looks_at_the_pin_first(op: HostOp) -> None:
    result = run("pin_vm", quiet(host=every(op)))
    assert result.truth["stage2_faults"].sum() == 0
    assert (result.host_ops[:, op] > 5).all()
    assert (run("map_on_fault", quiet(host=every(op))).truth["stage2_faults"] > 0).all()


@pytest.mark.parametrize("op", [HostOp.NUMA_SCAN, HostOp.KSM, HostOp.FORK, HostOp.MPROTECT, HostOp.MOVE])
def test_pin_vm_is_not_safe_from_notifiers_that_do_not(op: HostOp) -> None:
    """Each fault is the host's doing, is claimed as such, and is shown to the guest as an external abort."""
    result = run("pin_vm", quiet(host=every(op)))
    t = result.truth
    assert (t["stage2_faults"] > 0).all()
    assert (t["stage2_faults"] - t["injected_external"] <= 1).all()
    assert result.claims.sum() == result.claims[:, Cause.HOST, Cause.HOST].sum() > 0
    assert result.lost[:, :, LostCause.STAGE2_HOST].sum() == t["stage2_faults"].sum()


def test_pin_vm_pins_nothing_under_a_limit_that_is_too_low() -> None:
    limit = replace(QUIET, memlock_unlimited=False, memlock_pages=1000)
    result = run("pin_vm", quiet(kvm=limit), raise_memlock=False)
    assert (result.vm["pinned_peak_pages"] == 0).all()
    assert (result.truth["stage2_faults"] > 0).all()
    assert (run("pin_vm", quiet(kvm=limit)).vm["pinned_peak_pages"] == 1024).all()


# ---- map_on_fault ----------------------------------------------------------------------------------------------------


def test_map_on_fault_maps_page_by_page_and_never_pins() -> None:
    result = run("map_on_fault", quiet())
    t = result.truth
    assert (result.vm["pin_calls"] == 0).all()
    assert (t["stage2_faults"] >= 8).all()
    assert (t["stage2_faults"] <= 16).all()
    assert t["fatal"].sum() == 0
    assert (result.lost[:, :, LostCause.STAGE2_NOT_PINNED] == t["stage2_faults"]).all()
    assert (result.windows["cause"] != LostCause.STAGE2_HOST).all()


def test_map_on_fault_resumes_a_stream_that_was_cut() -> None:
    """Variable records cross into pages that are not mapped: DL=1 is hidden from the guest, the judge sees it."""
    result = run("map_on_fault", quiet(cpu=Cpu(max_record_bytes=64, align_bytes=4)))
    t = result.truth
    assert (t["data_loss"] > 0).all()
    assert (t["resumed_cut"] == t["data_loss"]).all()
    assert t["discarded"].sum() == 0
    assert (run("map_on_fault", quiet()).truth["data_loss"] == 0).all(), "fixed-size records are never cut"


# ---- eager_pin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager_pin", "synthetic_fault"])
def test_pinning_when_profiling_is_enabled_leaves_nothing_to_fault(name: str) -> None:
    result = run(name, quiet())
    assert result.truth["stage2_faults"].sum() == 0
    assert result.blackout_ps[:, :, LostCause.STAGE2_NOT_PINNED].sum() == 0
    assert (result.vm["pin_calls"] >= 8).all()
    assert (result.truth["written"] > 1000).all()


@pytest.mark.parametrize(("el0_only", "works"), [("error", False), ("first_fault", True)])
def test_eager_pin_does_not_see_the_eret_of_an_el0_session(el0_only: str, works: bool) -> None:
    result = run("eager_pin", quiet(guest=replace(fresh, profile_kernel=False)), el0_only=el0_only)
    t = result.truth
    assert (t["stage2_faults"] > 0).all()
    assert (t["injected_impdef"] > 0).all() != works
    assert (t["written"] > 100).all() == works


def test_eager_pin_is_refused_by_memlock_and_says_so() -> None:
    low = replace(QUIET, memlock_unlimited=False, memlock_pages=4)
    result = run("eager_pin", quiet(kvm=low))
    assert (result.truth["refused"] > 0).all()
    assert (result.truth["injected_impdef"] == result.truth["refused"]).all()
    assert (result.truth["written"] == 0).all()
    assert (result.vm["pin_refused"] > 0).all()
    assert (result.blackout_ps[:, :, LostCause.REFUSED] > 0).all()


def test_keep_mapped_trades_faults_for_divergence() -> None:
    """Events but UNMAP are ignored for pinned pages: no fault, and records in pages that the VMM no longer shows."""
    where = quiet(host=every(HostOp.DONTNEED, 50 * US))
    honest, blind = run("eager_pin", where), run("eager_pin", where, keep_mapped=True)
    assert (honest.truth["stage2_faults"] > 0).all()
    assert honest.truth["diverged_records"].sum() == 0
    assert (blind.vm["notifier_ignored"] > 0).all()
    assert (blind.truth["diverged_records"] > 0).all()
    assert (blind.truth["written"] > honest.truth["written"]).all()
    gone = run("eager_pin", quiet(host=every(HostOp.MUNMAP, 100 * US)), keep_mapped=True)
    assert (gone.truth["stage2_faults"] + gone.truth["refused"] > 0).all(), "UNMAP is honoured"


@pytest.mark.parametrize("name", PINNING)
def test_pinned_tables_stay_where_they_are(name: str) -> None:
    """Compaction leaves pinned pages alone. The walk of a TLB miss needs the tables as well as the buffer."""
    where = quiet(host=every(HostOp.COMPACT, 20 * US), cpu=Cpu(tlb_entries=1))
    faults = {pin: run(name, where, pin_stage1_tables=pin).truth["stage2_faults"].sum() for pin in (False, True)}
    assert faults[True] < faults[False] / 2


# ---- pin_on_fault and synthetic_fault --------------------------------------------------------------------------------


def test_pin_on_fault_pins_the_rest_of_the_buffer_at_the_first_fault() -> None:
    """One gap for each stretch that the guest opens, not one a page."""
    result, each = run("pin_on_fault", quiet()), run("map_on_fault", quiet())
    t = result.truth
    assert (t["stage2_faults"] >= 1).all()
    assert (t["stage2_faults"] <= 3).all()
    assert (t["stage2_faults"] < each.truth["stage2_faults"]).all()
    assert t["fatal"].sum() == 0
    assert (result.vm["pin_calls"] >= 8).all()


@pytest.mark.parametrize("name", ["pin_on_fault", "synthetic_fault"])
def test_a_fault_that_cut_a_record_is_told_to_the_guest(name: str) -> None:
    one_page = Host(kind=HostKind.RANDOM, random_ops=((int(HostOp.NUMA_SCAN), 10 * US, 1),))  # unmaps no more than it
    cpu = Cpu(max_record_bytes=64, align_bytes=4)
    result = run(name, quiet(host=one_page, cpu=cpu, guest=replace(fresh, ram_pages=64), duration_ps=6 * MS))
    t = result.truth
    assert t["data_loss"].sum() > 0
    assert t["resumed_cut"].sum() == 0
    assert 0 <= (t["data_loss"] - t["injected_impdef"]).sum() <= LANES
    assert t["discarded"].sum() > 0


def test_synthetic_fault_keeps_the_first_fault_of_an_el0_session() -> None:
    result = run("synthetic_fault", quiet(guest=replace(fresh, profile_kernel=False)))
    assert (result.truth["stage2_faults"] > 0).all()
    assert (result.truth["written"] > 100).all()
    assert result.truth["fatal"].sum() == 0


def test_the_time_of_a_policy_is_stolen_not_missed() -> None:
    """What KVM does takes host time: guest time is what it was, and the sum of the parts is the whole."""
    for name in POLICIES:
        result = run(name, scenario(host=busy_host(), duration_ps=2 * MS))
        t = result.truth
        parts = sum(
            t[f"{part}_ps"] for part in ("trap_total", "hook_total", "event_total", "switch_total", "other_host")
        )
        assert np.array_equal(result.vcpu["host_ps"], parts), name
        assert (result.vcpu["now_ps"] == 2 * MS).all()
