"""What hooks cost, how often they are called, and what their answers do to the guest: counted against the truth.

That each hook is called at all, and with what, is tested in `tests/properties/test_hooks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from spepolicy.batch import Vcpus, Vms
from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.hookspecs import Event, Trap, hookimpl
from spepolicy.judge.errata import Erratum, Findings
from spepolicy.lab.run import Plan, TrackingSettings, execute
from spepolicy.machine.hostops import HostOp, Notifier
from spepolicy.machine.scenario import Cpu, Host, HostKind, IrqDelivery, Scenario
from spepolicy.machine.state import LostCause

from ..properties.scenarios import MS, QUIET, US, guest, policy, scenario

S, COLL, DL, EA = 1 << 17, 1 << 16, 1 << 19, 1 << 18
E1SPE, E0SPE = 2, 1
BOTH = Trap.PMB | Trap.PMS
LANES = 5

# A full ring would restart the event by itself; a long session shows what a hook alone did.
calm = guest(task_on_ps=100 * MS, task_off_ps=0, buffer_pages=16, reader_latency_ps=US, reader_bytes_per_us=10**6)


def quiet(**changes: Any) -> Scenario:
    """No host, no exits but those of SPE; two context switches or more a millisecond."""
    return scenario(**({"kvm": QUIET, "duration_ps": MS} | changes))


@dataclass
class Call:
    """One call of a hook: the batch as arrays."""

    hook: str
    size: int
    pmbsr: Any = None
    pmscr: Any = None
    pmblimitr: Any = None
    pmbptr: Any = None


@dataclass
class Recorder:
    """A policy that writes down every call of its hooks and lets the guest go on."""

    trapped: Trap = BOTH
    answer: Callable[[Vcpus], None] = field(default=lambda faults: faults.inject(Event.IMPDEF, data_loss=True))
    at_enable: Callable[[Vcpus], None] = field(default=lambda vcpus: None)
    calls: list[Call] = field(default_factory=list)

    State: ClassVar[np.dtype[Any]] = np.dtype([("number", "i8")])

    def note(self, hook: str, batch: Vcpus) -> None:
        self.calls.append(Call(hook, len(batch), batch.pmbsr, batch.pmscr, batch.pmblimitr, batch.pmbptr))

    @hookimpl
    def traps(self) -> Trap:
        self.calls.append(Call("traps", 0))
        return self.trapped

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        self.calls.append(Call("vm_created", len(vms)))

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        self.note("buffer_enabled", vcpus)

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        self.note("profiling_enabled", vcpus)
        self.at_enable(vcpus)

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        self.note("buffer_disabled", vcpus)

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        self.note("stage2_fault", faults)
        self.answer(faults)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        self.calls.append(Call("vm_destroyed", len(vms)))

    def of(self, hook: str) -> list[Call]:
        return [call for call in self.calls if call.hook == hook]


def run(policy_: Any, scenario_: Scenario, lanes: int = LANES) -> Result:
    return simulate(scenario_, policy_, name="recorder", replicates=range(lanes), threads=1)


# ---- set-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trapped", [Trap.NONE, Trap.PMB, Trap.PMS, BOTH])
def test_a_trap_costs_each_access_and_shows_it(trapped: Trap) -> None:
    """Asked once; each group costs a trap an access, and a hook behind an access that does not trap is not called."""
    recorder = Recorder(trapped=trapped)
    result = run(recorder, quiet())
    assert len(recorder.of("traps")) == 1
    costs = result.scenario.costs.trap_ps
    assert (result.truth["trap_total_ps"] == result.truth["traps"] * costs).all()
    assert (result.truth["traps"].sum() > 0) == (trapped != Trap.NONE)
    called = {call.hook for call in recorder.calls}
    assert ("buffer_enabled" in called) == ("buffer_disabled" in called) == bool(trapped & Trap.PMB)
    assert ("profiling_enabled" in called) == bool(trapped)


def test_the_traps_of_both_groups_add_up() -> None:
    """The same guest makes the same accesses, so the traps of both groups are those of one and of the other."""
    count = {t: run(Recorder(trapped=t), quiet()).truth["traps"] for t in (Trap.PMB, Trap.PMS, BOTH)}
    assert (count[BOTH] == count[Trap.PMB] + count[Trap.PMS]).all()
    assert (count[Trap.PMB] > 0).all()
    assert (count[Trap.PMS] > 0).all()


@pytest.mark.parametrize("keep", [None, Notifier(0), Notifier.CLEAR, Notifier.PROTECTION_VMA, ~Notifier.UNMAP])
def test_each_notifier_event_is_filtered_by_its_own_bit(keep: Notifier | None) -> None:
    """Events in the mask do not unmap what is pinned: a NUMA scan is PROTECTION_VMA, a move CLEAR, munmap UNMAP."""

    @dataclass
    class Filter(Recorder):
        """Pins everything."""

        @hookimpl
        def notifier_filter(self) -> Notifier | None:
            self.calls.append(Call("notifier_filter", 0))
            return keep

        @hookimpl
        def vm_created(self, vms: Vms) -> None:
            vms.pin_all(ignore_limit=True)

    for op, event in (
        (HostOp.NUMA_SCAN, Notifier.PROTECTION_VMA),
        (HostOp.MOVE, Notifier.CLEAR),
        (HostOp.FORK, Notifier.PROTECTION_PAGE),
        (HostOp.SOFT_DIRTY, Notifier.SOFT_DIRTY),
        (HostOp.MUNMAP, Notifier.UNMAP),
    ):
        recorder = Filter()
        host = Host(kind=HostKind.RANDOM, random_ops=((int(op), 20 * US, 512),))  # whole 2 MiB: nothing is split
        result = run(recorder, quiet(host=host), lanes=2)
        ignored = bool((keep or Notifier(0)) & event)
        assert len(recorder.of("notifier_filter")) == 1
        assert (result.vm["stage2_unmapped"].sum() == 0) == ignored
        assert (result.vm["notifier_ignored"] == result.vm["notifier_calls"] * ignored).all()
        assert result.vm["notifier_calls"].sum() > 0


# ---- pinning ---------------------------------------------------------------------------------------------------------


def test_pinning_everything_is_start_up_time_or_refused() -> None:
    """Once, with all VMs, before anything ran; its time is start-up time and nobody's stolen time."""

    @dataclass
    class Pinner(Recorder):
        """Pins all memory if it may."""

        ignore_limit: bool = True

        @hookimpl
        def vm_created(self, vms: Vms) -> None:
            self.calls.append(Call("vm_created", len(vms)))
            self.status = vms.pin_all(ignore_limit=self.ignore_limit)

    free, limited = Pinner(), Pinner(ignore_limit=False)
    small_limit = quiet(kvm=replace(QUIET, memlock_unlimited=False, memlock_pages=1023))
    result, refused = run(free, small_limit), run(limited, small_limit)
    for recorder in (free, limited):
        assert recorder.calls[1].hook == "vm_created"
        assert recorder.calls[1].size == LANES
        assert len(recorder.of("vm_created")) == 1
    assert free.status.tolist() == [0] * LANES
    assert (result.vm["pinned_peak_pages"] == 1024).all()
    assert (result.vm["startup_ps"] == 1024 * result.scenario.costs.pin_page_ps).all()
    assert result.truth["hook_total_ps"].sum() == 0
    assert limited.status.tolist() == [1] * LANES
    assert (refused.vm["pinned_peak_pages"] == 0).all()
    assert (refused.vm["pin_refused"] == 1024).all()


# perf reads at once: a session begins only with a context switch, and goes on after a full buffer.
switching = guest(buffer_pages=16, reader_latency_ps=US, reader_bytes_per_us=10**6)


def test_profiling_is_enabled_at_starts_and_after_full_buffers() -> None:
    """E=1, S=0, E1SPE=1: by PMSCR_EL1 at each start of a session, by PMBSR_EL1 when it goes on after a full buffer."""
    called, starts, restarts = {}, 0, 0
    for trapped in (Trap.PMB, Trap.PMS, BOTH):
        recorder = Recorder(trapped=trapped)
        result = run(recorder, quiet(guest=switching))
        for call in recorder.of("profiling_enabled"):
            assert (call.pmblimitr & 1 == 1).all()
            assert (call.pmbsr & S == 0).all()
            assert (call.pmscr & E1SPE != 0).all()
        called[trapped] = sum(call.size for call in recorder.of("profiling_enabled"))
        if trapped == Trap.PMB:
            restarts = int(result.truth["buffer_full"].sum())
            starts = int(result.truth["sessions"].sum()) - restarts
    assert 0 <= restarts - called[Trap.PMB] <= LANES, "an event at the very end is not handled any more"
    assert 0 <= called[Trap.PMS] - starts <= LANES
    assert called[BOTH] == called[Trap.PMB] + called[Trap.PMS]
    assert called[Trap.PMS] > LANES


def test_what_a_policy_does_is_charged_to_its_vcpu() -> None:
    """What a policy does there is host time of the vCPU: the guest stands still."""
    recorder = Recorder(at_enable=lambda vcpus: _pin(vcpus))
    result = run(recorder, quiet(guest=calm))
    costs = result.scenario.costs
    one = 16 // 2  # up to the wakeup in the middle of the ring
    first = 4 * costs.walk_read_ps + (one - 1) * costs.walk_read_ps + one * costs.pin_page_ps
    assert (result.truth["hook_total_ps"] >= first).all()
    assert (result.truth["hook_total_ps"] % (costs.walk_read_ps) == 0).all()
    assert (result.vm["pin_calls"] > 0).all()
    assert (result.vm["pinned_peak_pages"] <= 16).all()


def _pin(vcpus: Vcpus) -> None:
    vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi).ok.pin().ok.unpin_previous()


def test_each_stop_of_a_session_disables_the_buffer() -> None:
    """After arm_spe_pmu_stop cleared PMBLIMITR_EL1.E, when the guest has drained: one a stop."""
    recorder = Recorder(trapped=Trap.PMB)
    result = run(recorder, quiet(guest=switching))
    for call in recorder.of("buffer_disabled"):
        assert (call.pmblimitr & 1 == 0).all()
        assert (call.pmscr == 0).all()
    starts = int(result.truth["sessions"].sum() - result.truth["buffer_full"].sum())
    stopped = sum(call.size for call in recorder.of("buffer_disabled"))
    assert starts - LANES <= stopped <= starts + LANES
    assert stopped > LANES


# ---- fault handling --------------------------------------------------------------------------------------------------

unmapped = guest(buffer_mapped=False, buffer_pages=16, task_on_ps=100 * MS, task_off_ps=0, reader_latency_ps=US)


def test_a_fault_shows_what_the_hardware_has() -> None:
    """Once per batch after the exit: S=1, EC=0x25, the VA in PMBPTR, FSC and DL as the hardware has them."""
    seen: list[tuple[Any, Any]] = []

    def look(faults: Vcpus) -> None:
        seen.append((faults.fault_status, faults.data_loss))
        _map(faults)

    recorder = Recorder(answer=look)
    result = run(recorder, quiet(guest=unmapped))
    calls = recorder.of("stage2_fault")
    assert calls[0].size == LANES
    assert sum(call.size for call in calls) == result.truth["stage2_faults"].sum()
    for call, (status, loss) in zip(calls, seen, strict=True):
        assert (call.pmbsr >> 26 & 0x3F == 0x25).all()
        assert (call.pmbsr & S != 0).all()
        assert (status == (call.pmbsr & 0x3F).astype(np.int64)).all()
        assert (status == 0x07).all()
        assert not loss.any()
        assert (call.pmbptr & 0xFFF == 0).all()
        assert (call.pmbptr < call.pmblimitr).all()


def _map(faults: Vcpus) -> None:
    page = faults.buffer_lo
    walk = faults.walk_stage1(page, page + np.uint64(4096))
    walk.failed.inject(Event.STAGE1_ABORT)
    assert walk.ok.map().all()
    walk.ok.resume()


def test_after_map_and_resume_the_guest_knows_nothing() -> None:
    """Mapped and resumed, the guest never knows: each page faults once, the stream has no gap but the lost sample."""
    recorder = Recorder(answer=_map)
    result = run(recorder, quiet(guest=unmapped))
    t = result.truth
    assert (t["stage2_faults"] > 2).all()
    assert (t["stage2_faults"] <= 16).all()
    assert (result.lost[:, :, LostCause.STAGE2_NOT_PINNED] == t["stage2_faults"]).all()
    assert t["fatal"].sum() == t["truncated"].sum() == t["discarded"].sum() == 0
    assert (t["written"] > 1000).all()


def test_resume_without_repair_faults_again() -> None:
    recorder = Recorder(answer=lambda faults: faults.resume())
    result = run(recorder, quiet(guest=unmapped))
    assert (result.truth["stage2_faults"] > 50).all()
    assert (result.truth["written"] == 0).all()
    assert (result.truth["selected"] >= result.truth["stage2_faults"]).all()


def test_dl_costs_the_records_of_the_session_if_their_size_varies() -> None:
    """DL=1 and no fixed size: what was written in this session is thrown away, to the last record."""
    host = Host(kind=HostKind.RANDOM, random_ops=((int(HostOp.MPROTECT), 200 * US, 1024),))
    kept = {}
    for align in (64, 16):
        cpu = Cpu(max_record_bytes=64, align_bytes=align)
        recorder = Recorder()
        result = run(recorder, quiet(guest=calm, host=host, cpu=cpu, duration_ps=2 * MS))
        t = result.truth
        assert (t["stage2_faults"] > 0).all()
        assert (t["written"] == t["kept"] + t["discarded"]).all()
        kept[align] = t
    assert (kept[64]["discarded"] == 0).all()
    assert (kept[16]["discarded"] > 0).sum() >= LANES - 1


def test_the_next_exit_reports_a_fault_if_nothing_forces_one() -> None:
    """NEXT_EXIT: KVM learns of the event at an exit that comes for another reason, so the blackout is longer."""
    lengths = {}
    for delivery in IrqDelivery:
        kvm = replace(QUIET, exit_interval_ps=100 * US, irq_delivery=delivery)
        result = run(Recorder(answer=_map), scenario(kvm=kvm, guest=unmapped, duration_ps=2 * MS), lanes=20)
        windows = result.windows[result.windows["cause"] == LostCause.STAGE2_NOT_PINNED]
        lengths[delivery] = windows["length_ps"].mean()
    assert lengths[IrqDelivery.FORCED_EXIT] < 3 * US
    assert 30 * US < lengths[IrqDelivery.NEXT_EXIT] < 300 * US


# ---- errata and the end ----------------------------------------------------------------------------------------------


@dataclass
class Documents(Recorder):
    """A policy that documents a limitation."""

    @hookimpl
    def errata(self) -> list[Erratum]:
        self.calls.append(Call("errata", 0))
        return [Erratum("TEST-1", "A limitation", "always", "all", "none", "none", "low", "kvm")]


class Watcher:
    """A reporter and observer."""

    def __init__(self) -> None:
        self.findings: list[Findings] = []
        self.reports: list[Any] = []

    @hookimpl
    def report_errata(self, findings: Findings) -> list[Erratum]:
        self.findings.append(findings)
        return [
            Erratum(
                "TEST-2", "Seen", "a fault", "all", "none", "none", "low", "kvm", count=findings.count("stage2_fault")
            )
        ]

    @hookimpl
    def run_finished(self, report: Any) -> str:
        self.reports.append((report, sorted(path.name for path in report.run_dir.iterdir())))
        return "ignored"


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Documents, Watcher, Any]:
    """A whole run of a policy that documents and a plugin that watches."""
    documents, watcher = Documents(answer=_map), Watcher()
    monkeypatch.setattr("spepolicy.plugins.installed_reporters", lambda: {"watcher": watcher})
    plan = Plan(
        chosen="documents", policies={"documents": documents, "bare_metal": policy("bare_metal")},
        scenario=quiet(guest=unmapped), replicates=4, threads=1, run_dir=tmp_path / "run",
        tracking=TrackingSettings(kind="none"), config={"seed": 1}, notes=(),
    )  # fmt: skip
    return documents, watcher, execute(plan, lambda text: None)


def test_a_documented_limitation_is_in_the_report(finished: tuple[Documents, Watcher, Any]) -> None:
    """Once; a limitation is in the report whether or not it occurred."""
    documents, _, report = finished
    assert len(documents.of("errata")) == 1
    documented = [erratum for erratum in report.errata if erratum.id == "TEST-1"]
    assert len(documented) == 1
    assert documented[0].count == 0


def test_a_reporter_is_asked_once_a_policy(finished: tuple[Documents, Watcher, Any]) -> None:
    """Once a policy, with what the judge counted; the answers reach the report."""
    _, watcher, report = finished
    assert [findings.policy for findings in watcher.findings] == ["documents", "bare_metal"]
    assert [findings.virtualized for findings in watcher.findings] == [True, False]
    faults = watcher.findings[0].count("stage2_fault")
    assert faults > 0
    assert watcher.findings[1].count("stage2_fault") == 0
    assert [erratum.count for erratum in report.errata if erratum.id == "TEST-2"] == [faults]


def test_an_observer_is_told_once_when_all_is_stored(finished: tuple[Documents, Watcher, Any]) -> None:
    """Once, when everything is stored, with the report; what it returns is ignored."""
    _, watcher, report = finished
    assert len(watcher.reports) == 1
    told, files = watcher.reports[0]
    assert told is report
    assert {"metrics.json", "errata.json", "lanes.parquet", "blackouts.parquet"} <= set(files)
