"""KVM owns the buffer and copies: what the guest gets, what it costs, and what goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from spepolicy.batch import Vcpus
from spepolicy.drivers.simulate import record_lane, simulate
from spepolicy.errors import HookError, UnsupportedPolicyError
from spepolicy.hookspecs import Event, Ownership, hookimpl
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.linux_spe import COLLISION
from spepolicy.machine.scenario import Cpu, SessionMode
from spepolicy.machine.state import LostCause
from spepolicy.machine.trace import AUX

from ..properties.scenarios import conserved, policy
from .runs import FGT, LANES, MS, US, every, fresh, quiet, run

COPIES = ("all", "lazy", "chunked", "collision")
switching = replace(fresh, task_on_ps=200 * US, task_off_ps=60 * US)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("op", [HostOp.NUMA_SCAN, HostOp.RECLAIM, HostOp.KSM, HostOp.MOVE, HostOp.MPROTECT])
def test_nothing_that_the_host_does_makes_the_spu_fault(copy: str, op: HostOp) -> None:
    """The SPU writes host memory of the kernel's; no pin, no fault, and every record reaches the guest."""
    result = run("copy_buffer", quiet(guest=switching, host=every(op)), copy=copy)
    t = result.truth
    assert t["stage2_faults"].sum() == t["stage1_faults"].sum() == t["fatal"].sum() == 0
    assert result.vm["pin_calls"].sum() == 0
    assert (t["written"] == t["kept"]).all()
    assert conserved(result).all()


def test_the_guest_gets_the_records_that_bare_metal_gives_it() -> None:
    """Copied at the stop, from a buffer as large: the guest's program and its driver see the same machine but for the
    time of traps and copies, which no guest time passes in.
    """
    where = quiet(guest=switching)
    metal, copied = run("bare_metal", where), run("copy_buffer", where, copy="all")
    assert (copied.truth["copies"] > 3).all()
    assert (copied.truth["kept"] >= 0.97 * metal.truth["kept"]).all()
    assert copied.truth["sessions"].sum() > 0.9 * metal.truth["sessions"].sum()
    assert (np.abs(copied.truth["buffer_full"] - metal.truth["buffer_full"]) <= 2).all()


def test_every_byte_is_copied_once_and_paid_for() -> None:
    """Fixed-size records: bytes copied = records kept, less what is still in KVM's buffer at the end."""
    where = quiet(guest=switching)
    result = run("copy_buffer", where, copy="all")
    t, costs = result.truth, where.costs
    record = where.cpu.max_record_bytes
    assert (t["copied_bytes"] % record == 0).all()
    left = t["kept"] - t["copied_bytes"] // record
    assert (left >= 0).all()
    assert (left <= 16 * 4096 // record).all()
    floor = t["copied_bytes"] * costs.copy_out_page_ps // 4096
    assert (t["copy_ps"] >= floor - t["copies"] * 16).all()
    assert (t["copy_ps"] <= t["hook_total_ps"]).all()
    assert (t["copy_ps"] > floor).all(), "the walk is not free"


def test_a_small_buffer_is_copied_chunk_by_chunk_with_a_gap_each() -> None:
    where = quiet(guest=replace(fresh, buffer_pages=256))
    whole = run("copy_buffer", where, copy="all")
    chunked = run("copy_buffer", where, copy="chunked", buffer_KiB=8)
    t = chunked.truth
    assert (t["copies"] > 5 * np.maximum(whole.truth["copies"], 1)).all()
    assert (chunked.vm["own_pages"] == 2).all()
    assert (whole.vm["own_pages"] >= 100).all()
    assert (chunked.blackout_ps.sum(axis=(1, 2)) > whole.blackout_ps.sum(axis=(1, 2))).all()
    assert (t["kept"] < whole.truth["kept"]).all()
    assert t["fatal"].sum() == 0


def test_what_was_missed_between_chunks_can_be_told_as_collisions() -> None:
    """The same records; the guest's driver sees PMBSR_EL1.COLL and flags the AUX data."""
    rare = replace(switching, period_ops=8192)  # so that the SPU has no collisions of its own
    where = quiet(guest=rare, cpu=Cpu(tlb_entries=1), duration_ps=10 * MS)
    seen: dict[str, list[Any]] = {}
    told: dict[str, int] = {}
    for copy in ("chunked", "collision"):
        fields: dict[str, Any] = {"copy": copy, "buffer_KiB": 8}
        result = run("copy_buffer", where, **fields)
        seen[copy] = [result.truth["digest"].tolist(), result.truth["kept"].tolist()]
        assert result.truth["collided"][0].sum() == 0
        rows = record_lane(where, policy("copy_buffer", **fields), name=copy, replicate=0).rows
        flags = rows["detail"][rows["kind"] == AUX]
        told[copy] = int(np.count_nonzero(flags & COLLISION))
    assert seen["chunked"] == seen["collision"]
    assert told["chunked"] == 0
    assert told["collision"] > 0, "PERF_AUX_FLAG_COLLISION, by PMBSR_EL1.COLL"


@pytest.mark.parametrize("copy", ["chunked", "collision"])
def test_the_vmm_can_be_told_that_the_guest_s_buffer_exceeds_kvm_s(copy: str) -> None:
    """7f: an exit a chunk, which the host pays for; the guest's profile is what it is without."""
    where = quiet(guest=switching)
    silent, told = (run("copy_buffer", where, copy=copy, buffer_KiB=8, tell_vmm=it) for it in (False, True))
    np.testing.assert_array_equal(told.truth["digest"], silent.truth["digest"])
    exits = told.truth["hook_total_ps"] - silent.truth["hook_total_ps"]
    assert (exits > 0).all()
    assert (exits % where.costs.vmm_exit_ps == 0).all()
    large = [run("copy_buffer", where, copy=copy, buffer_KiB=1024, tell_vmm=it).truth for it in (False, True)]
    np.testing.assert_array_equal(large[0]["hook_total_ps"], large[1]["hook_total_ps"])


def test_lazy_copies_what_is_read() -> None:
    """The stop costs less, reading costs more; what nobody reads is not copied."""
    where = quiet(guest=switching)
    now, later = run("copy_buffer", where, copy="all"), run("copy_buffer", where, copy="lazy")
    assert now.truth["deferred_copies"].sum() == 0
    assert (later.truth["deferred_copies"] > 0).all()
    assert (later.truth["cpu_faults"] > 0).all()
    unread = run("copy_buffer", quiet(guest=replace(switching, reader_latency_ps=1000 * MS)), copy="lazy")
    assert unread.truth["deferred_copies"].sum() == 0
    assert (unread.truth["copies"] > 0).all()


def test_records_are_lost_where_the_vmm_has_no_page() -> None:
    """munmap() under the guest: the copy fails, the guest is told with DL, nothing is kept that was not delivered."""
    result = run("copy_buffer", quiet(guest=switching, host=every(HostOp.MUNMAP, 300 * US)), copy="all")
    t = result.truth
    assert (t["discarded"] > 0).all()
    assert (t["injected_impdef"] > 0).all()
    assert t["silent_fatal"].sum() == 0
    assert conserved(result).all()


@pytest.mark.parametrize("session", list(SessionMode))
@pytest.mark.parametrize("copy", COPIES)
def test_sessions_of_every_kind_go_on(session: SessionMode, copy: str) -> None:
    busy = replace(switching, session=session, renew_ps=300 * US, vcpus=2)
    result = run("copy_buffer", quiet(guest=busy, cpu=Cpu(align_bytes=4)), copy=copy, buffer_KiB=8)
    assert (result.truth["sessions"] >= 3).all()
    assert (result.truth["kept"] > 1000).all()
    assert conserved(result).all()
    assert result.blackout_ps[:, :, LostCause.REFUSED].sum() == 0


def test_hiding_the_owner_needs_fgt_and_otherwise_is_a_documented_limit() -> None:
    with pytest.raises(UnsupportedPolicyError, match="PMBIDR_EL1, which needs FEAT_FGT"):
        run("copy_buffer", quiet(), hide_ownership=True)
    from spepolicy_plugins.copy_buffer import CopyBuffer

    assert [erratum.id for erratum in CopyBuffer().errata()] == ["SPE-KVM-20"]
    assert CopyBuffer(hide_ownership=True).errata() == []
    assert (run("copy_buffer", quiet(cpu=FGT), hide_ownership=True).truth["written"] > 0).all()


@dataclass
class Owner:
    """Own the buffer, and do in the hooks what a test wants."""

    full: str = "copy"
    stop: str = "copy"

    @hookimpl
    def ownership(self) -> Ownership:
        return Ownership.KVM

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        vcpus.start_own_buffer(2)

    @hookimpl
    def own_buffer_full(self, vcpus: Vcpus) -> None:
        if self.full == "copy":
            done = vcpus.copy_out()
            done.room.start_own_buffer(2)
            done.full.inject(Event.BUFFER_FULL)

    @hookimpl
    def buffer_stopping(self, vcpus: Vcpus) -> None:
        if self.stop == "copy":
            vcpus.copy_out()


def test_a_policy_that_forgets_a_full_buffer_or_a_stop_is_told() -> None:
    where = quiet(guest=switching)
    for broken, said in ((Owner(full="nothing"), "own_buffer_full"), (Owner(stop="nothing"), "buffer_stopping")):
        with pytest.raises(HookError, match=rf"hook {said}\(\) left"):
            simulate(where, broken, name="owner", replicates=range(2), threads=1)
    assert (simulate(where, Owner(), name="owner", replicates=range(LANES)).truth["kept"] > 100).all()


def test_the_tools_of_an_own_buffer_need_ownership() -> None:
    @dataclass
    class Guest:
        """A policy that copies a buffer which it does not own."""

        @hookimpl
        def stage2_fault(self, faults: Vcpus) -> None:
            faults.copy_out()

    with pytest.raises(HookError, match=r"copy_out\(\) while the guest owns the buffer"):
        simulate(quiet(), Guest(), name="guest", replicates=range(2), threads=1)
