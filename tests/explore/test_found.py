"""What people found over the years, found without being told (kvm.md 4), and what must not be found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from spepolicy.batch import Vcpus, Vms
from spepolicy.errors import HookError
from spepolicy.explore.acts import Act, Event, event_name
from spepolicy.explore.added import AddedProperty
from spepolicy.explore.bench import Bench
from spepolicy.explore.properties import Kind
from spepolicy.explore.search import Bounds, Found, Outcome, search
from spepolicy.explore.trace import replay
from spepolicy.hookspecs import Cause, Trap, hookimpl
from spepolicy.hookspecs import Event as Told
from spepolicy.machine.hostops import Backing, HostOp
from spepolicy.machine.scenario import Cpu, Handling, MigrationKind

from .conftest import explored, model_of

VARIABLE = Cpu(align_bytes=1)  # records of many sizes, not aligned: one may cross from page to page
V1P3 = Cpu(spe_version=4)


def names(found: Found) -> list[str]:
    return [event_name(event) for event in found.events]


def ways(outcome: Outcome, kind: Kind, detail: int | None = None) -> list[Found]:
    """Return the traces of a kind, each of which shows its violation, at its end, and needs all of its events."""
    found = [f for f in outcome.found if f.kind is kind and (detail is None or f.detail == detail)]
    if found:
        assert_minimal(outcome, found)
    return found


def assert_minimal(outcome: Outcome, traces: list[Found]) -> None:
    """Replay each trace, and then without each of its events in turn: the violation is gone every time."""
    bench = Bench(outcome.model, 1)
    for found in traces:
        run = replay(bench, found.events, found.cycle)
        assert all(step.possible for step in run.steps)
        if found.added is not None:
            assert found.added.name in {rule.name for rule in run.steps[-1].added}
        else:
            way = (found.kind, found.detail)
            assert way in zip(run.steps[-1].kinds, run.steps[-1].details, strict=True)
            assert not any(way in zip(step.kinds, step.details, strict=True) for step in run.steps[:-1])
        for left_out in range(len(found.events)):
            rest = found.events[:left_out] + found.events[left_out + 1 :]
            cycle = max(found.cycle - 1, 0) if left_out >= len(found.events) - found.cycle else found.cycle
            less = replay(bench, rest, cycle)
            if found.added is not None:
                assert found.added.name not in less.broken(), (names(found), left_out)
            else:
                ways = {way for step in less.steps for way in zip(step.kinds, step.details, strict=True)}
                assert (found.kind, found.detail) not in ways, (names(found), left_out)


@dataclass
class PinWhileEnabled:
    """Pin when the buffer becomes enabled, whatever is profiled (kvm.md P8)."""

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        walk = vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi, pin_tables=True)
        walk.failed.inject(Told.STAGE1_ABORT)
        walk.ok.pin().ok.unpin_previous()

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        vcpus.unpin()

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Told.IMPDEF, data_loss=True)


@dataclass
class Leaky(PinWhileEnabled):
    """The same, but it forgets the pins when the VM goes."""

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        pass


@dataclass
class Stubborn:
    """Resume without doing anything about the fault."""

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.resume()


def search_instance(policy: object, depth: int, **settings: Any) -> Outcome:
    return search(model_of(policy, **settings), Bounds(max_depth=depth, max_states=1_000_000))


# ---- the ERET -------------------------------------------------------------------------------------------------------


def test_eager_pin_does_not_see_the_eret_into_profiling() -> None:
    """G1, M. Rutland by A. Elisei, 25 July 2022: {1,0}, and nothing traps when profiling becomes enabled."""
    found = ways(explored("eager_pin", 8), Kind.BLACKOUT)
    assert [f.events[0] for f in found] == [Event(found[0].events[0].act, 1)]  # PMSCR_EL1.E0SPE alone
    assert names(found[0]) == ["open {1,0}", "driver", "driver", "write"]


def test_eager_pin_has_no_blackout_where_it_sees_profiling_become_enabled() -> None:
    outcome = explored("eager_pin", 999, sessions=("el0_el1", "el1"), memlock_pages=100)
    assert outcome.complete
    assert not ways(outcome, Kind.BLACKOUT)


def test_pinning_while_the_buffer_is_enabled_has_no_blackout_with_a_lawful_guest() -> None:
    """P8, RFC v6: the buffer is enabled by a write that traps, the ERET does not matter."""
    outcome = search_instance(PinWhileEnabled(), 999, edits="disabled", memlock_pages=100)
    assert outcome.complete
    assert not ways(outcome, Kind.BLACKOUT)


def test_but_it_has_one_with_a_guest_that_edits_its_tables_before_the_eret() -> None:
    """G2: what is left of the corner case in P8. Legal by the Arm ARM, not by DEN0154."""
    outcome = search_instance(PinWhileEnabled(), 14, edits="profiling_off", sessions=("el0",))
    assert not ways(outcome, Kind.BLACKOUT)
    (found,) = ways(outcome, Kind.BLACKOUT_EDITED)
    assert any(name.startswith("move_page") for name in names(found))


# ---- blackouts of the others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", ["el0_el1", "el0", "el1"])
def test_pin_on_fault_has_a_blackout_before_the_first_record(session: str) -> None:
    """P5: one a session, by design."""
    (found,) = ways(explored("pin_on_fault", 8, sessions=(session,)), Kind.BLACKOUT)
    assert names(found)[-1] == "write"


def test_a_synthetic_fault_removes_it_at_el1_only() -> None:
    """P6, O. Upton 2 August 2022."""
    seen = explored("synthetic_fault", 999, sessions=("el0_el1", "el1"), memlock_pages=100)
    assert seen.complete
    assert not ways(seen, Kind.BLACKOUT)
    assert ways(explored("synthetic_fault", 8, sessions=("el0",)), Kind.BLACKOUT)


# ---- loss -----------------------------------------------------------------------------------------------------------


def test_map_on_fault_hides_a_cut_record() -> None:
    """A1: with records of variable size one is cut at the page that is not mapped, and the guest is not told of DL."""
    (found,) = ways(explored("map_on_fault", 12, cpu=VARIABLE, buffer_pages=4), Kind.CUT_RESUMED)
    assert "write" in names(found)
    assert not ways(
        explored("map_on_fault", 12, buffer_pages=4), Kind.CUT_RESUMED
    )  # records of fixed size end with the page


def test_an_external_abort_without_dl_switches_spe_off_and_tells_nobody() -> None:
    """E2 and spe.md 3.4: what RFC v5 did, after any notifier."""
    outcome = explored("pin_vm", 12, host_ops=("numa_scan",))
    assert ways(outcome, Kind.SWITCHED_OFF)


@pytest.mark.parametrize(("cpu", "forbidden"), [(Cpu(), False), (V1P3, True)])
def test_an_external_abort_event_is_forbidden_from_v1p3_on(cpu: Cpu, forbidden: bool) -> None:
    """A7, O. Upton 9 August 2022."""
    outcome = explored("pin_vm", 10, host_ops=("numa_scan",), cpu=cpu)
    assert bool(ways(outcome, Kind.EXTERNAL_ABORT)) is forbidden


# ---- the host -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [HostOp.NUMA_SCAN, HostOp.KSM, HostOp.FORK, HostOp.SOFT_DIRTY])
def test_notifiers_take_the_mapping_of_a_pinned_page(op: HostOp) -> None:
    """H1, H2 and the rest: a pin keeps the page, not the stage 2 entry."""
    outcome = explored("eager_pin", 10, host_ops=("numa_scan", "ksm", "fork", "soft_dirty", "compact"))
    (found,) = ways(outcome, Kind.PINNED_FAULT, op)
    assert f"host {op.name.lower()} buffer 0" in names(found)
    assert ways(outcome, Kind.BLACKOUT_HOST, op)


def test_what_the_measured_host_leaves_alone_is_not_found() -> None:
    """Compaction and NUMA migration test the reference count first (spepolicy.machine.effects)."""
    outcome = explored("eager_pin", 10, host_ops=("numa_scan", "ksm", "fork", "soft_dirty", "compact"))
    assert not ways(outcome, Kind.PINNED_FAULT, HostOp.COMPACT)


def test_a_filter_keeps_the_mapping_and_diverges() -> None:
    """H8: "ignore all but UNMAP" also ignores MADV_DONTNEED."""
    kept = explored("eager_pin", 12, {"keep_mapped": True}, host_ops=("numa_scan", "dontneed"))
    assert not ways(kept, Kind.PINNED_FAULT, HostOp.NUMA_SCAN)
    (found,) = ways(kept, Kind.DIVERGED, HostOp.DONTNEED)
    assert names(found)[-1] == "write"
    plain = explored("eager_pin", 12, {"keep_mapped": False}, host_ops=("numa_scan", "dontneed"))
    assert not ways(plain, Kind.DIVERGED)


@pytest.mark.parametrize("policy", ["eager_pin", "pin_vm", "pin_on_fault", "synthetic_fault"])
def test_a_pin_is_stale_after_madv_dontneed(policy: str) -> None:
    """H7."""
    assert ways(explored(policy, 8, host_ops=("dontneed",)), Kind.STALE_PIN, HostOp.DONTNEED)


# ---- pins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["eager_pin", "pin_on_fault", "synthetic_fault"])
def test_cycling_buffers_exhausts_memlock(policy: str) -> None:
    """G7, A. Elisei 19 April 2022: the new buffer is pinned before the old one is unpinned."""
    limits = {"eager_pin": 1, "pin_on_fault": 6, "synthetic_fault": 6}  # half of the ring, and its tables
    outcome = explored(policy, 24, memlock_pages=limits[policy], max_switches=0, sessions=("el0_el1",))
    (found,) = ways(outcome, Kind.REFUSED)
    if policy == "eager_pin":
        assert "renew" in names(found) or names(found).count("driver") > 2
    assert not ways(outcome, Kind.OVER_LIMIT)


def test_a_buffer_of_physical_addresses_pins_no_tables_and_stays_the_guests() -> None:
    """P13: with PMBLIMITR_EL1.nVM the SPU writes to the IPAs that the driver names. A limit of the ring is enough,
    no order of events makes a blackout, and what is written lands in the ring. Without nVM tables are pinned, too.
    """
    limit: dict[str, Any] = {"cpu": Cpu(features=("nVM",)), "memlock_pages": 2}
    physical = explored("physical_mode", 10, physical_buffer=True, **limit)
    assert physical.states > 500
    assert not physical.found
    assert ways(explored("physical_mode", 10, physical_buffer=False, **limit), Kind.REFUSED)


def test_a_policy_that_forgets_its_pins_is_found_out() -> None:
    (found,) = ways(search_instance(Leaky(), 6), Kind.LEAK)
    assert names(found) == ["open {1,1}", "vm_end"]
    assert not ways(search_instance(PinWhileEnabled(), 6), Kind.LEAK)


# ---- migration ------------------------------------------------------------------------------------------------------

POSTCOPY: dict[str, Any] = {"migration": MigrationKind.POSTCOPY, "sessions": ("el0_el1",), "max_switches": 0}
PRECOPY: dict[str, Any] = POSTCOPY | {"migration": MigrationKind.PRECOPY}


@pytest.mark.parametrize("policy", ["eager_pin", "pin_on_fault", "map_on_fault"])
def test_post_copy_faults(policy: str) -> None:
    """L3, O. Upton 27 July 2022: absent on the target, and no way to wait for it."""
    (found,) = ways(explored(policy, 8, **POSTCOPY), Kind.ABSENT_PAGE)
    assert names(found)[-3:] == ["migrate_start", "migrate_resume", "write"]


def test_a_prefaulted_target_has_no_post_copy_fault_of_an_open_session() -> None:
    """M7: what is enabled is mapped before the vCPU runs; a session opened later is none of its business."""
    outcome = explored("map_on_fault", 9, handling=Handling.PREFAULT_TARGET, **POSTCOPY)
    (found,) = ways(outcome, Kind.ABSENT_PAGE)
    assert names(found).index("migrate_resume") < names(found).index("open {1,1}")


@pytest.mark.parametrize("policy", ["eager_pin", "pin_on_fault", "map_on_fault"])
def test_the_dirty_log_takes_the_buffer_away(policy: str) -> None:
    """L1: stage 2 is write-protected, and the SPU writes."""
    outcome = explored(policy, 8, **PRECOPY)
    (found,) = ways(outcome, Kind.BLACKOUT_MIGRATION)
    assert "migrate_start" in names(found)
    assert not ways(outcome, Kind.UNLOGGED)


@pytest.mark.parametrize(("handling", "lost"), [(Handling.UNREPORTED, True), (Handling.REPORT_DIRTY, False)])
def test_what_is_not_write_protected_must_be_reported(handling: Handling, lost: bool) -> None:
    """L2 and M6, M. Zyngier 27 July 2022."""
    outcome = explored("eager_pin", 9, {"pin_stage1_tables": True}, handling=handling, **PRECOPY)
    assert bool(ways(outcome, Kind.UNLOGGED)) is lost


def test_spe_that_is_stopped_for_a_migration_is_a_blackout_that_nobody_is_told_of() -> None:
    """M4 and L6: KVM_ARM_VCPU_SPE_STOP_TRAP."""
    (found,) = ways(explored("pin_vm", 6, handling=Handling.STOP_TRAP, **PRECOPY), Kind.BLACKOUT_MIGRATION)
    assert names(found) == ["open {1,1}", "driver", "migrate_start"]


def test_a_vcpu_that_the_vmm_holds_does_nothing() -> None:
    """M3: from the write that turns SPE on while the log is on, to the end of the migration."""
    bench = Bench(model_of("eager_pin", handling=Handling.EXIT_WHILE_LOGGING, **PRECOPY), 1)
    by_name = {event_name(event): n for n, event in enumerate(bench.model.events)}
    for name in ("migrate_start", "open {1,1}"):
        assert bench.possible()[by_name[name]]
        bench.step(bench.model.events[by_name[name]])
    assert bench.m.vcpu["blocked"][0, 0] == 1
    assert {name for name, n in by_name.items() if bench.possible()[n]} == {
        "migrate_round", "migrate_stop", "migrate_cancel"
    }  # fmt: skip
    bench.step(bench.model.events[by_name["migrate_cancel"]])
    assert bench.possible()[by_name["driver"]]


# ---- the drain ------------------------------------------------------------------------------------------------------


@dataclass
class UnpinAtDisable(PinWhileEnabled):
    """Unpin as soon as profiling is disabled, which is before the guest's drain."""

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def profiling_disabled(self, vcpus: Vcpus) -> None:
        vcpus.unpin()


DRAIN: dict[str, Any] = {
    "in_flight": True, "host_ops": ("reclaim", "compact"), "sessions": ("el0_el1",), "max_syscalls": 0, "max_exits": 0
}  # fmt: skip


def test_unpinning_at_disable_makes_the_drain_fault() -> None:
    """A19, A. Elisei 27 July 2022: the PSB CSYNC comes after PMSCR_EL1=0, and writes."""
    outcome = search_instance(UnpinAtDisable(), 7, **DRAIN)
    found = ways(outcome, Kind.DRAIN_FAULT, HostOp.RECLAIM)[0]
    assert names(found) == ["open {1,1}", "driver", "select", "switch_out", "host reclaim buffer 0", "driver"]
    kept = search_instance(PinWhileEnabled(), 7, **DRAIN)
    assert not ways(kept, Kind.DRAIN_FAULT)
    assert not ways(kept, Kind.BLACKOUT_HOST, HostOp.RECLAIM)  # what is pinned is not reclaimed


# ---- huge pages and two vCPUs ---------------------------------------------------------------------------------------


def test_what_the_host_does_to_one_page_takes_the_huge_page_from_stage_2() -> None:
    """H1 and H3: a pinned huge page loses its block; a split of it for a neighbour's sake is enough."""
    outcome = explored(
        "eager_pin", 4, {"pin_stage1_tables": True}, backing=Backing.THP, max_syscalls=0, max_exits=0,
        sessions=("el0_el1",), host_targets=("buffer", "former"),
        host_ops=("numa_scan", "mprotect", "ksm", "thp_split"),
    )  # fmt: skip
    assert ways(outcome, Kind.PINNED_FAULT, HostOp.NUMA_SCAN)
    assert ways(outcome, Kind.PINNED_FAULT, HostOp.MPROTECT)
    for op in (HostOp.KSM, HostOp.THP_SPLIT):  # measured: both look at the pin first
        assert not ways(outcome, Kind.PINNED_FAULT, op)


def test_a_limit_that_holds_one_vcpus_buffer_does_not_hold_two() -> None:
    settings: dict[str, Any] = {"max_renewals": 0, "max_switches": 0, "max_syscalls": 0, "max_exits": 0}
    one = explored("eager_pin", 99, memlock_pages=2, **settings)
    assert one.complete
    assert not ways(one, Kind.REFUSED)
    two = explored("eager_pin", 13, memlock_pages=2, vcpus=2, **settings)
    assert two.states > one.states
    (found,) = ways(two, Kind.REFUSED)
    assert {event.vcpu for event in found.events} == {0, 1}
    assert len({event.a for event in found.events if event.act is Act.OPEN}) == 1  # one perf event, on both


# ---- claims and livelocks -------------------------------------------------------------------------------------------


def test_eager_pin_blames_a_host_that_has_done_nothing() -> None:
    """Its handler claims HOST for every fault; the first one of a {1,0} session is nobody's."""
    assert ways(explored("eager_pin", 8), Kind.IMPOSSIBLE_CLAIM)
    assert not ways(explored("pin_on_fault", 8), Kind.IMPOSSIBLE_CLAIM)


@dataclass
class Excuse(PinWhileEnabled):
    """Always say that nothing had been pinned yet."""

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.NOT_PINNED)
        faults.inject(Told.IMPDEF, data_loss=True)


def test_a_page_that_is_pinned_is_not_one_that_is_not_pinned_yet() -> None:
    outcome = search_instance(Excuse(), 9, host_ops=("numa_scan",), sessions=("el0_el1",))
    (found,) = ways(outcome, Kind.IMPOSSIBLE_CLAIM)
    assert found.detail == Cause.NOT_PINNED
    assert "host numa_scan buffer 0" in names(found)
    assert not ways(search_instance(Excuse(), 9, sessions=("el0_el1",)), Kind.IMPOSSIBLE_CLAIM)


def test_a_fault_that_nobody_repairs_comes_for_ever() -> None:
    (found,) = ways(search_instance(Stubborn(), 8), Kind.LIVELOCK)
    assert names(found)[-found.cycle :] in (["write", "irq"], ["irq", "write"])
    assert not ways(explored("map_on_fault", 12), Kind.LIVELOCK)


# ---- a guest that breaks the rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["eager_pin", "pin_on_fault", "map_on_fault"])
def test_what_a_hostile_guest_does_stays_in_the_guest(policy: str) -> None:
    """Q18, W. Deacon 1 August 2022."""
    outcome = explored(
        policy, 11, edits="any", tlbi=(True, False), max_edits=2, max_renewals=0, host_ops=("dontneed", "reclaim")
    )
    assert outcome.states > 10_000
    assert not ways(outcome, Kind.OUTSIDE)


def test_a_bare_guest_writes_registers_as_it_likes() -> None:
    outcome = explored("pin_on_fault", 9, guest="bare", max_register_writes=5, edits="any")
    assert outcome.states > 1000
    assert not ways(outcome, Kind.OUTSIDE)
    (found,) = ways(outcome, Kind.BLACKOUT)
    assert {"enable 0", "eret", "write"} & set(names(found))


# ---- properties of plugins ------------------------------------------------------------------------------------------


@dataclass
class Watched(PinWhileEnabled):
    """The same, with properties of its own."""

    @hookimpl
    def explore_properties(self) -> list[AddedProperty]:
        return [
            AddedProperty("nothing_pinned", "no page is pinned", "a test", lambda s: s.vm("pinned_pages") != 0),
            AddedProperty("one_vm", "there is a VM", "a test", lambda s: s.vcpu("level") > 1),
        ]


def test_a_plugin_adds_properties() -> None:
    outcome = search_instance(Watched(), 5)
    (found,) = ways(outcome, Kind.ADDED)
    assert (found.rule.name, names(found)) == ("nothing_pinned", ["open {1,1}"])
    run = replay(Bench(outcome.model, 1), found.events)
    assert run.broken() == {"nothing_pinned": 1}


@dataclass
class Careless(PinWhileEnabled):
    """With a property that returns nonsense."""

    @hookimpl
    def explore_properties(self) -> list[AddedProperty]:
        return [AddedProperty("nonsense", "", "", lambda s: s.vm("pinned_pages"))]  # type: ignore[arg-type,return-value]


def test_a_property_that_returns_nonsense_is_named() -> None:
    with pytest.raises(HookError, match="property 'nonsense' returned int64"):
        search_instance(Careless(), 2)


# ---- traces ---------------------------------------------------------------------------------------------------------

SHOWN = [
    ("eager_pin", {}, 8, {}),
    ("eager_pin", {"keep_mapped": True}, 12, {"host_ops": ("numa_scan", "dontneed")}),
    ("pin_on_fault", {}, 8, {"host_ops": ("numa_scan", "dontneed")}),
    ("map_on_fault", {}, 12, {"cpu": VARIABLE, "buffer_pages": 4}),
    ("pin_vm", {}, 12, {"host_ops": ("numa_scan",)}),
]


@pytest.mark.parametrize(("policy", "fields", "depth", "settings"), SHOWN)
def test_every_trace_shows_its_violation_and_needs_each_of_its_events(
    policy: str, fields: dict[str, Any], depth: int, settings: dict[str, Any]
) -> None:
    outcome = explored(policy, depth, fields, **settings)
    assert outcome.found
    assert_minimal(outcome, outcome.found)
