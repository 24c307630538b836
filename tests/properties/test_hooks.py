"""Every hook: when it is called, with what, and what its answer does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spepolicy.batch import Vcpus, Vms
from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.errors import HookError, PluginError, UnsupportedPolicyError
from spepolicy.hookspecs import (
    Cause,
    Event,
    ObserverSpec,
    Ownership,
    Platform,
    PolicySpec,
    ReporterSpec,
    Trap,
    hookimpl,
)
from spepolicy.machine.hostops import HostOp, Notifier
from spepolicy.machine.scenario import Cpu, Host, Migration, MigrationKind
from spepolicy.machine.state import LostCause

from .scenarios import MS, QUIET, US, busy_host, conserved, guest, policy, scenario

ROOMY = guest(buffer_pages=128, reader_latency_ps=10 * US)  # perf keeps up: the ring is never full
SCANS = busy_host(HostOp.NUMA_SCAN, interval_ps=150 * US, pages=1024)


@dataclass
class Recorder:
    """Write down every call; repair faults so that the run goes on."""

    trap: Trap = Trap.PMB | Trap.PMS
    answer: Event | None = None
    data_loss: bool = False
    calls: list[tuple[str, int]] = field(default_factory=list)
    syndromes: list[int] = field(default_factory=list)

    @hookimpl
    def traps(self) -> Trap:
        return self.trap

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        self.calls.append(("vm_created", len(vms)))

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        self.calls.append(("vm_destroyed", len(vms)))

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        self.calls.append(("buffer_enabled", len(vcpus)))
        assert ((vcpus.pmblimitr & np.uint64(1)) == 1).all(), "PMBLIMITR_EL1.E"
        assert ((vcpus.pmbsr & np.uint64(1 << 17)) == 0).all(), "PMBSR_EL1.S"

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        self.calls.append(("profiling_enabled", len(vcpus)))
        assert ((vcpus.pmscr & np.uint64(0b10)) != 0).all(), "PMSCR_EL1.E1SPE"
        assert (vcpus.buffer_lo < vcpus.buffer_hi).all()

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        self.calls.append(("buffer_disabled", len(vcpus)))
        assert ((vcpus.pmblimitr & np.uint64(1)) == 0).all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        self.calls.append(("stage2_fault", len(faults)))
        self.syndromes += [int(value) for value in faults.pmbsr]
        if self.answer is not None:
            faults.inject(self.answer, data_loss=self.data_loss)
            return
        walk = faults.walk_stage1(faults.buffer_lo, faults.buffer_lo + np.uint64(4096), pin_tables=True)
        good = walk.ok
        good.map()
        good.resume()
        walk.failed.inject(Event.STAGE1_ABORT)

    def count(self, name: str) -> int:
        return sum(size for call, size in self.calls if call == name)


def run(recorder: Recorder, lanes: int = 4, **changes: Any) -> Result:
    result = simulate(
        scenario(**({"kvm": QUIET} | changes)), recorder, name="recorder", replicates=range(lanes), threads=1
    )
    assert conserved(result).all()
    return result


def test_every_hook_has_a_test() -> None:
    """A hook that nobody tests does not exist."""
    specs = (PolicySpec, ReporterSpec, ObserverSpec)
    hooks = {name for spec in specs for name in vars(spec) if not name.startswith("_")}
    tests = {name.removeprefix("test_hook_") for name in globals() if name.startswith("test_hook_")}
    assert {hook for hook in hooks if not any(test == hook or test.startswith(hook + "__") for test in tests)} == set()


def test_every_hook_says_how_often_it_is_called() -> None:
    for spec in (PolicySpec, ReporterSpec, ObserverSpec):
        for name, member in vars(spec).items():
            if not name.startswith("_"):
                assert "Once per" in (inspect.getdoc(member) or ""), name


def test_hook_virtualization() -> None:
    """False takes stage 2, traps, exits and the host away."""
    result = simulate(scenario(host=SCANS), policy("bare_metal"), name="b", replicates=range(3))
    assert result.vcpu["host_ps"].sum() == 0
    assert result.vm["host_events"].sum() == 0
    assert result.truth["stage2_faults"].sum() == 0


def test_hook_traps() -> None:
    """Only the groups that trap cost an exit an access, and only they let the hooks behind them be called."""
    both, none = Recorder(), Recorder(trap=Trap.NONE)
    trapped, free = run(both), run(none)
    assert free.truth["traps"].sum() == 0
    assert free.vcpu["host_ps"].sum() == free.truth["event_total_ps"].sum()
    assert trapped.truth["trap_total_ps"].sum() == trapped.truth["traps"].sum() * 2 * US
    assert {name for name, _ in none.calls} == {"vm_created", "vm_destroyed"}
    buffer, sampling = Recorder(trap=Trap.PMB), Recorder(trap=Trap.PMS)
    run(buffer)
    run(sampling)
    assert sampling.count("buffer_enabled") == sampling.count("buffer_disabled") == 0
    # A start ends with PMSCR_EL1; the restart after a full buffer ends with PMBSR_EL1.
    assert both.count("profiling_enabled") == buffer.count("profiling_enabled") + sampling.count("profiling_enabled")
    assert buffer.count("profiling_enabled") > 0
    assert sampling.count("profiling_enabled") > 0


@dataclass
class Physical(Recorder):
    """Recorder that offers PMBLIMITR_EL1.nVM, or not, and looks at the buffers that it is shown."""

    offered: bool = True
    seen: set[bool] = field(default_factory=set)

    @hookimpl
    def physical_addressing(self) -> bool:
        return self.offered

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        self.calls.append(("buffer_enabled", len(vcpus)))
        self.seen |= set(vcpus.physical.tolist())
        assert (vcpus.buffer_hi[vcpus.physical] <= 1 << 40).all(), "an intermediate physical address, not a virtual one"
        assert (vcpus.buffer_lo[~vcpus.physical] >= 0xFFFF << 48).all()


@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize("features", [("nVM",), ()])
def test_hook_physical_addressing(offered: bool, features: tuple[str, ...]) -> None:
    """A driver that knows nVM gives physical addresses where KVM and the processor offer it, and nowhere else."""
    recorder = Physical(answer=Event.IMPDEF, offered=offered)
    run(recorder, guest=guest(physical_buffer=True), cpu=Cpu(features=features))
    assert recorder.seen == {offered and features == ("nVM",)}


def test_hook_notifier_filter() -> None:
    """An ignored event leaves the stage 2 entry of a pinned page; UNMAP is honoured all the same."""
    scan = scenario(host=SCANS, kvm=QUIET)
    fields = {"pin_stage1_tables": True}
    honoured = simulate(scan, policy("eager_pin", **fields), name="e", replicates=range(4))
    kept = simulate(scan, policy("eager_pin", keep_mapped=True, **fields), name="e", replicates=range(4))
    assert honoured.truth["stage2_faults"].sum() > 0
    assert kept.truth["stage2_faults"].sum() == 0
    assert kept.vm["notifier_ignored"].sum() > 0
    assert policy("eager_pin", keep_mapped=True).notifier_filter() & Notifier.UNMAP == 0
    gone = scenario(host=busy_host(HostOp.MUNMAP, interval_ps=400 * US, pages=1024), kvm=QUIET)
    lost = simulate(gone, policy("eager_pin", keep_mapped=True, **fields), name="e", replicates=range(4))
    assert lost.truth["stage2_faults"].sum() > 0


def test_hook_vm_created() -> None:
    """Once for all VMs of a chunk, before anything runs; pin_all() counts as start-up, not as stolen time."""
    recorder = Recorder()
    run(recorder, lanes=5)
    assert recorder.calls[0] == ("vm_created", 5)
    assert recorder.count("vm_created") == 5
    pinned = simulate(scenario(kvm=QUIET), policy("pin_vm"), name="p", replicates=range(2))
    assert (pinned.vm["startup_ps"] > 0).all()
    assert pinned.truth["hook_total_ps"].sum() == 0
    assert (pinned.vm["pinned_peak_pages"] == 1024).all()


def test_hook_vm_destroyed() -> None:
    """Once for each VM, last; what a policy has not unpinned by then is a leak that the judge sees."""
    recorder = Recorder()
    run(recorder, lanes=5)
    assert recorder.count("vm_destroyed") == 5
    for name in ("pin_vm", "eager_pin", "pin_on_fault", "synthetic_fault"):
        result = simulate(scenario(host=SCANS), policy(name), name=name, replicates=range(3))
        assert (result.vm["pinned_pages"] == 0).all(), name
        assert (result.vm["pinned_peak_pages"] > 0).all(), name


def test_hook_buffer_enabled() -> None:
    """Once for each handle that perf opened with space in the ring: a start, or a restart after a full buffer."""
    recorder = Recorder()
    result = run(recorder)
    assert recorder.count("buffer_enabled") == result.truth["sessions"].sum()


def test_hook_profiling_enabled() -> None:
    """With E1SPE set, each enabled buffer becomes profiling by a trapped write."""
    recorder = Recorder()
    result = run(recorder)
    assert recorder.count("profiling_enabled") == result.truth["sessions"].sum()


def test_hook_profiling_enabled__not_for_el0_only() -> None:
    """{E0SPE,E1SPE} = {1,0} becomes enabled by an ERET, which KVM does not see (kvm.md G1)."""
    recorder = Recorder()
    result = run(recorder, guest=guest(profile_kernel=False))
    assert recorder.count("profiling_enabled") == 0
    assert recorder.count("buffer_enabled") > 0
    assert result.truth["written"].sum() > 0


def test_hook_buffer_disabled() -> None:
    """At each sched-out of the profiled task, after the drain; and when the handler of the interrupt finds no room for
    more and writes PMBLIMITR_EL1=0 (arm_spe_perf_aux_output_begin).
    """
    recorder = Recorder()
    run(recorder)
    starts = recorder.count("buffer_enabled")
    assert 0 < recorder.count("buffer_disabled") <= starts
    with_room, without = Recorder(), Recorder()
    run(with_room, guest=replace(ROOMY, session=1))
    assert with_room.count("buffer_disabled") == 0
    result = run(without, guest=guest(session=1))
    assert result.truth["truncated"].sum() > 0
    assert without.count("buffer_disabled") > 0


@dataclass
class Disabling(Recorder):
    """Recorder that also looks at writes of PMSCR_EL1=0."""

    @hookimpl
    def profiling_disabled(self, vcpus: Vcpus) -> None:
        self.calls.append(("profiling_disabled", len(vcpus)))
        assert ((vcpus.pmscr & np.uint64(0b11)) == 0).all(), "PMSCR_EL1 is written"
        assert ((vcpus.pmblimitr & np.uint64(1)) == 1).all(), "PMBLIMITR_EL1.E is not"
        assert ((vcpus.pmbsr & np.uint64(1 << 17)) == 0).all(), "PMBSR_EL1.S"


def test_hook_profiling_disabled() -> None:
    """At each sched-out that finds the SPU running; the drain comes later, and nothing else is different."""
    recorder, plain = Disabling(), Recorder()
    result, same = run(recorder), run(plain)
    assert 0 < recorder.count("profiling_disabled") <= recorder.count("buffer_disabled")
    for name in ("digest", "selected", "written", "kept", "traps"):
        assert (result.truth[name] == same.truth[name]).all(), name
    unseen = Disabling(trap=Trap.PMB)
    run(unseen)
    assert unseen.count("profiling_disabled") == 0


def test_hook_stage2_fault() -> None:
    """S=1 and EC=0x25 reach the hook; after resume() the SPU goes on at the same pointer and the guest sees nothing."""
    recorder = Recorder()
    result = run(recorder, host=SCANS, guest=ROOMY)
    assert recorder.count("stage2_fault") == result.truth["stage2_faults"].sum() > 0
    assert all(value >> 26 == 0x25 and value >> 17 & 1 for value in recorder.syndromes)
    assert result.truth["fatal"].sum() == result.truth["truncated"].sum() == 0
    assert result.lost[:, :, LostCause.STAGE2_HOST].sum() + result.lost[:, :, LostCause.STAGE2_NOT_PINNED].sum() == (
        result.truth["stage2_faults"].sum()
    )


@pytest.mark.parametrize("event", [event for event in Event if event not in (Event.STAGE2_ABORT, Event.BUFFER_FULL)])
@pytest.mark.parametrize("loss", [False, True])
def test_hook_stage2_fault__told_to_the_guest(event: Event, loss: bool) -> None:
    """Linux answers every event but buffer full by switching SPE off; only DL makes perf know (spe.md 3.4)."""
    recorder = Recorder(answer=event, data_loss=loss)
    result = run(recorder, host=SCANS, guest=ROOMY)
    faults = result.truth["stage2_faults"].sum()
    assert faults > 0
    # A fault in the last drain of a session is found by arm_spe_pmu_stop() and not by the interrupt handler.
    assert 0 < result.truth["fatal"].sum() <= faults
    assert bool(result.truth["truncated"].sum()) is loss
    assert result.truth["silent_fatal"].sum() == (0 if loss else result.truth["fatal"].sum())
    assert result.truth["forged_loss"].sum() == (faults if loss else 0)
    told = {
        Event.STAGE1_ABORT: "injected_stage1",
        Event.EXTERNAL_ABORT: "injected_external",
        Event.IMPDEF: "injected_impdef",
        Event.TOO_LARGE: "injected_too_large",
    }
    assert result.truth[told[event]].sum() == faults


DOCUMENTED = """
from dataclasses import dataclass

from spepolicy.hookspecs import Event, hookimpl
from spepolicy.judge.errata import Erratum


@dataclass
class Documented:
    'A policy with a documented limitation.'

    @hookimpl
    def stage2_fault(self, faults):
        faults.inject(Event.IMPDEF)

    @hookimpl
    def errata(self):
        return [Erratum(id="DOC-1", title="Documented", trigger="always", versions="all", effect_on_guest="none",
                        effect_on_profile="none", severity="low", blame="kvm", documented=True)]
"""


def test_hook_errata(install: Callable[..., Path], tmp_path: Path) -> None:
    """What a policy documents is in the report whether or not it happened."""
    install(DOCUMENTED, {"documented": "Documented"})
    done = subprocess.run(
        [sys.executable, "-m", "spepolicy", "+policy=documented", "host=silent", "duration=2ms", "replicates=1",
         "tracking=none", f"output.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = next(tmp_path.rglob("errata.json"))
    assert "DOC-1" in json.dumps(json.loads(page.read_text()))


def test_hook_report_errata() -> None:
    """The shipped reporter turns what the judge saw into errata."""
    from spepolicy.judge.findings import find
    from spepolicy_plugins.errata import KernelErrata

    # SPEv1p3, from which on an external abort must not be reported as a buffer management event (rule 42).
    later = scenario(host=SCANS, cpu=Cpu(spe_version=4))
    result = simulate(later, policy("pin_vm"), name="pin_vm", replicates=range(3))
    found = KernelErrata().report_errata(find(result, virtualized=True, hooks=["stage2_fault"]))
    assert any("external abort" in (erratum.title + erratum.trigger).lower() for erratum in found)


def test_hook_run_finished() -> None:
    """Observers are called by spepolicy.lab.run, which tests/lab covers; here: all implementations count."""
    assert ObserverSpec.run_finished.spepolicy_spec["firstresult"] is False


# ---- the contract ----------------------------------------------------------------------------------------------------


@dataclass
class Breaker:
    """A policy that breaks the contract at its first fault."""

    how: str = ""
    State = np.dtype([("count", "i8")])

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        if self.how == "raise":
            raise ZeroDivisionError("division by zero")
        if self.how == "mask shape":
            faults.where(np.zeros(len(faults) + 1, dtype=bool))
        if self.how == "mask dtype":
            faults.where(np.zeros(len(faults)))
        if self.how == "range dtype":
            faults.walk_stage1(faults.buffer_lo.astype(float), faults.buffer_hi)
        if self.how == "state":
            faults.state["cuont"] = 1
        if self.how == "claim":
            faults.claim(np.full(len(faults), 99))
        if self.how == "event":
            faults.inject(3)  # type: ignore[arg-type]
        if self.how == "half":
            faults.where(np.arange(len(faults)) % 2 == 0).inject(Event.IMPDEF)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ZeroDivisionError: division by zero"),
        ("nothing", "without an answer"),
        ("half", "without an answer"),
        ("mask shape", "has shape"),
        ("mask dtype", "dtype float64"),
        ("range dtype", "dtype float64"),
        ("state", "'cuont' does not exist. Declared in State: count"),
        ("claim", "Cause, 0..5"),
        ("event", "a member of spepolicy.hookspecs.Event"),
    ],
)
def test_a_broken_contract_names_policy_hook_and_rule(how: str, message: str) -> None:
    silent_start = scenario(host=SCANS, kvm=QUIET, guest=guest(buffer_mapped=False))
    with pytest.raises(HookError) as caught:
        simulate(silent_start, Breaker(how), name="breaker", replicates=range(3), threads=1)
    assert "policy 'breaker', hook stage2_fault()" in str(caught.value)
    assert message in str(caught.value)


def test_a_misspelt_hook_is_named() -> None:
    @dataclass
    class Misspelt(Recorder):
        """A policy with a hook that does not exist."""

        @hookimpl
        def profiling_enabeld(self, vcpus: Vcpus) -> None:
            pass

    with pytest.raises(PluginError, match=r"profiling_enabeld.*profiling_enabled"):
        simulate(scenario(), Misspelt(), name="misspelt", replicates=[0])


def test_state_is_a_row_a_vcpu_and_starts_at_zero() -> None:
    @dataclass
    class Counter(Recorder):
        """Count one's own enabling writes."""

        State = np.dtype([("writes", "i8"), ("lo", "u8")])

        @hookimpl
        def buffer_enabled(self, vcpus: Vcpus) -> None:
            vcpus.state["writes"] = vcpus.state["writes"] + 1
            vcpus.state["lo"] = vcpus.buffer_lo
            self.calls.append(("writes", int(vcpus.state["writes"].max())))

    counter = Counter()
    result = run(counter, lanes=3)
    assert max(value for name, value in counter.calls if name == "writes") == result.truth["sessions"].max()


def test_claims_are_scored_against_the_truth() -> None:
    """eager_pin blames the host, pin_on_fault itself; the host did it."""
    for name, claimed in (("eager_pin", Cause.HOST), ("pin_on_fault", Cause.NOT_PINNED)):
        result = simulate(scenario(host=SCANS, kvm=QUIET), policy(name), name=name, replicates=range(3))
        assert result.claims.sum() == result.claims[:, claimed, :].sum() > 0
        assert result.claims[:, :, Cause.HOST].sum() > 0.9 * result.claims.sum()


# ---- DL at record boundaries (rules 38 and 39) -----------------------------------------------------------------------


def _faulting(cpu: Cpu, host: Host = SCANS) -> tuple[Recorder, Result]:
    recorder = Recorder()
    return recorder, run(recorder, cpu=cpu, host=host, duration_ps=6 * MS, lanes=8)


def test_fixed_size_records_are_never_cut() -> None:
    """64-byte records aligned to 64 never cross a page: DL stays 0."""
    recorder, result = _faulting(Cpu())
    assert len(recorder.syndromes) > 10
    assert not any(value >> 19 & 1 for value in recorder.syndromes)
    assert result.truth["data_loss"].sum() == 0


def test_a_record_across_a_page_is_cut_with_data_loss() -> None:
    """Records of variable size: some faults come in the middle of a record; PMBPTR is then the page boundary."""
    recorder, result = _faulting(Cpu(align_bytes=1))
    cut = sum(value >> 19 & 1 for value in recorder.syndromes)
    assert 0 < cut < len(recorder.syndromes)
    assert result.truth["data_loss"].sum() == cut == result.truth["resumed_cut"].sum()


def test_data_loss_at_a_boundary_is_the_implementations_choice() -> None:
    """RYZJQX: with data_loss_at_boundary every fault reports DL."""
    recorder, _ = _faulting(Cpu(data_loss_at_boundary=True))
    assert recorder.syndromes
    assert all(value >> 19 & 1 for value in recorder.syndromes)


def test_cut_records_discard_what_the_handle_holds() -> None:
    """Told of DL, the guest throws away records of variable size, which it cannot parse; fixed-size ones are kept."""
    for align, discards in ((1, True), (64, False)):
        recorder = Recorder(answer=Event.IMPDEF, data_loss=True)
        result = run(recorder, cpu=Cpu(align_bytes=align), host=SCANS, duration_ps=6 * MS, lanes=8)
        assert bool(result.truth["discarded"].sum()) is discards


# ---- hooks of single policies ----------------------------------------------------------------------------------------


@dataclass
class Picky:
    """Run on machines with FEAT_FGT only, and remember what it was told of the machine."""

    seen: list[Platform] = field(default_factory=list)

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        self.seen.append(platform)
        return None if platform.fine_grained_traps else "it needs FEAT_FGT (cpu.fine_grained_traps=false)"

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.IMPDEF)


def test_hook_supports() -> None:
    """Asked before anything runs, with what the VMM knows; a reason ends the run."""
    picky = Picky()
    with pytest.raises(UnsupportedPolicyError, match="policy 'picky' cannot run on this machine: it needs FEAT_FGT"):
        simulate(scenario(), picky, name="picky", replicates=[0])
    able = scenario(cpu=Cpu(fine_grained_traps=True, spe_version=4), host=SCANS)
    assert simulate(able, picky, name="picky", replicates=[0]).finished.all()
    first, last = picky.seen[0], picky.seen[-1]
    assert (first.memory_pages, first.memlock_pages, first.vcpus) == (1024, 64, 1)
    assert not first.numa_balancing
    assert last.numa_balancing
    assert last.spe_version == 4


@dataclass
class Owning:
    """Own the buffer as *owner* says; write down which hooks are called, and with which registers."""

    owner: Ownership = Ownership.KVM
    calls: list[tuple[str, int]] = field(default_factory=list)

    @hookimpl
    def ownership(self) -> Ownership:
        return self.owner

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        assert (vcpus.pmblimitr & 1 == 1).all()
        assert (vcpus.buffer_hi > vcpus.buffer_lo).all()
        vcpus.start_own_buffer(1)

    @hookimpl
    def own_buffer_full(self, vcpus: Vcpus) -> None:
        self.calls.append(("own_buffer_full", len(vcpus)))
        before = vcpus.pmbptr
        done = vcpus.copy_out()
        assert (vcpus.pmbptr > before).all()
        done.room.start_own_buffer(1)
        done.full.inject(Event.BUFFER_FULL)

    @hookimpl
    def buffer_stopping(self, vcpus: Vcpus) -> None:
        self.calls.append(("buffer_stopping", len(vcpus)))
        assert (vcpus.pmblimitr & 1 == 1).all(), "the guest's write is what trapped: it has not taken effect"
        assert (vcpus.pmscr == 0).all()
        vcpus.copy_out()


def test_hook_ownership() -> None:
    """KVM: the SPU never faults and the guest gets its records; NOBODY: it has no SPE."""
    unmapped = scenario(guest=guest(buffer_mapped=False), host=SCANS)
    own, none = (
        simulate(unmapped, Owning(owner), name="o", replicates=range(3)) for owner in (Ownership.KVM, Ownership.NOBODY)
    )
    assert own.truth["stage2_faults"].sum() == 0
    assert (own.truth["kept"] > 100).all()
    assert none.truth["selected"].sum() == none.truth["traps"].sum() == 0
    with pytest.raises(HookError, match="returned 1"):
        simulate(unmapped, Owning(1), name="o", replicates=[0])  # type: ignore[arg-type]


def test_hook_own_buffer_full() -> None:
    """Once each time that KVM's page is full, after the exit; the guest's driver sees its own buffer full only."""
    owning = Owning()
    result = simulate(scenario(guest=ROOMY), owning, name="o", replicates=range(3))
    called = sum(size for name, size in owning.calls if name == "own_buffer_full")
    assert 0 <= result.truth["buffer_full"].sum() - called <= 3
    assert result.truth["fatal"].sum() == 0


def test_hook_buffer_stopping() -> None:
    """Once each time that the guest clears E while KVM's buffer runs, after the drain, before PMBPTR is read."""
    owning = Owning()
    result = simulate(scenario(guest=ROOMY), owning, name="o", replicates=range(3))
    stops = sum(size for name, size in owning.calls if name == "buffer_stopping")
    assert stops > 10
    assert stops <= result.truth["sessions"].sum()
    assert (result.truth["written"] == result.truth["kept"]).all(), "every record was copied before the guest looked"


@dataclass
class Timed:
    """Arm ERET traps, set timers, and write down when the hooks of both come."""

    arm: bool = False
    delay_us: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)
    announced: list[Any] = field(default_factory=list)

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def buffer_announced(self, vcpus: Vcpus) -> None:
        self.calls.append(("buffer_announced", len(vcpus)))
        self.announced.append((vcpus.announced_lo, vcpus.announced_hi))

    @hookimpl
    def user_profiling_armed(self, vcpus: Vcpus) -> None:
        self.calls.append(("user_profiling_armed", len(vcpus)))
        assert (vcpus.pmscr & 3 == 1).all()
        assert (vcpus.pmblimitr & 1 == 1).all()
        if self.arm:
            vcpus.trap_eret(True)
        if self.delay_us:
            vcpus.set_timer(self.delay_us * 1000)

    @hookimpl
    def eret(self, vcpus: Vcpus) -> None:
        self.calls.append(("eret", len(vcpus)))
        vcpus.trap_eret(False)

    @hookimpl
    def timer(self, vcpus: Vcpus) -> None:
        self.calls.append(("timer", len(vcpus)))

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.IMPDEF)

    def count(self, hook: str) -> int:
        return sum(size for name, size in self.calls if name == hook)


def test_hook_buffer_announced() -> None:
    """A paravirtual guest calls with the range of each new ring; others never do."""
    for paravirtual in (False, True):
        timed = Timed()
        calling = scenario(guest=guest(paravirtual=paravirtual, renew_ps=400 * US))
        result = simulate(calling, timed, name="t", replicates=range(3), threads=1)
        assert timed.count("buffer_announced") == result.truth["announced"].sum()
        assert (timed.count("buffer_announced") > 3) == paravirtual
        for lo, hi in timed.announced:
            assert (hi - lo == 4 * 4096).all()


def test_hook_user_profiling_armed() -> None:
    """After a write that leaves {E0SPE,E1SPE} = {1,0} with the buffer on; never with E1SPE."""
    timed = Timed()
    simulate(scenario(guest=guest(profile_kernel=False)), timed, name="t", replicates=range(3), threads=1)
    assert timed.count("user_profiling_armed") > 10
    both = Timed()
    simulate(scenario(), both, name="t", replicates=range(3), threads=1)
    assert both.count("user_profiling_armed") == 0


def test_hook_eret() -> None:
    """The first return to EL0 after the trap was armed, at the price of a trap; without FEAT_FGT arming is an error."""
    user_only = guest(profile_kernel=False)
    timed = Timed(arm=True)
    able = scenario(guest=user_only, cpu=Cpu(fine_grained_traps=True))
    result = simulate(able, timed, name="t", replicates=range(3), threads=1)
    assert 0 <= timed.count("user_profiling_armed") - timed.count("eret") <= 3
    assert timed.count("eret") == result.truth["eret_traps"].sum() > 10
    with pytest.raises(HookError, match="without FEAT_FGT"):
        simulate(scenario(guest=user_only), Timed(arm=True), name="t", replicates=[0])


def test_hook_timer() -> None:
    """Fires once for each time that it was set and had run out; one that is set again starts anew."""
    user_only = scenario(guest=guest(profile_kernel=False))
    soon, late = Timed(delay_us=1), Timed(delay_us=10_000_000)
    simulate(user_only, soon, name="t", replicates=range(3), threads=1)
    simulate(user_only, late, name="t", replicates=range(3), threads=1)
    assert 0 <= soon.count("user_profiling_armed") - soon.count("timer") <= 3
    assert soon.count("timer") > 10
    assert late.count("timer") == 0


def migrated() -> list[tuple[str, int, int, int]]:
    """Migrate four VMs of two vCPUs; return (hook, VMs, vCPUs, pinned pages) of each call."""
    seen: list[tuple[str, int, int, int]] = []

    @dataclass
    class Told(Recorder):
        """Write down what is said of migrations."""

        @hookimpl
        def migration_started(self, vms: Vms, vcpus: Vcpus) -> None:
            seen.append(("started", len(vms), len(vcpus), int(vcpus.pinned_pages.sum())))

        @hookimpl
        def migration_finished(self, vms: Vms, vcpus: Vcpus) -> None:
            seen.append(("finished", len(vms), len(vcpus), int(vcpus.pinned_pages.sum())))

    moved = Migration(kind=MigrationKind.PRECOPY, start_ps=10**9, bandwidth_bytes_per_us=20_000, switch_ps=10**7)
    run(Told(), guest=guest(vcpus=2), migration=moved)
    return seen


def test_hook_migration_started() -> None:
    """Once a VM, with all of its vCPUs."""
    batches = [entry for entry in migrated() if entry[0] == "started"]
    assert sum(vms for _, vms, _, _ in batches) == 4
    assert all(vcpus == 2 * vms for _, vms, vcpus, _ in batches)


def test_hook_migration_finished() -> None:
    """Once a VM, with all of its vCPUs, on a target where nothing is pinned."""
    batches = [entry for entry in migrated() if entry[0] == "finished"]
    assert sum(vms for _, vms, _, _ in batches) == 4
    assert all((vcpus, pinned) == (2 * vms, 0) for _, vms, vcpus, pinned in batches)
