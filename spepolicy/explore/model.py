"""From settings to a model: the small machine that is explored, and the list of events that can happen to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from spepolicy.explore.acts import Act, Budget, Event, Target
from spepolicy.explore.bench import Model
from spepolicy.explore.image import HUGE
from spepolicy.explore.possible import EDITS_ANY, EDITS_DISABLED, EDITS_NEVER, EDITS_OFF
from spepolicy.machine.guestacts import GuestAct
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.hostpage import FOLIO
from spepolicy.machine.scenario import (
    Bug,
    Cpu,
    Guest,
    Handling,
    Host,
    IrqDelivery,
    Kvm,
    Migration,
    MigrationKind,
    Scenario,
    SessionMode,
    Workload,
)

__all__ = ["EDIT_RULES", "HOST_TARGETS", "SESSIONS", "Settings", "make_model", "workload"]

EDIT_RULES: Mapping[str, int] = {
    "never": EDITS_NEVER,
    "disabled": EDITS_DISABLED,
    "profiling_off": EDITS_OFF,
    "any": EDITS_ANY,
}
SESSIONS: Mapping[str, int] = {"el0_el1": 3, "el0": 1, "el1": 2}  # PMSCR_EL1 by what perf asks for
HOST_TARGETS: Mapping[str, Target] = {"buffer": Target.BUFFER, "former": Target.FORMER, "table": Target.TABLE}

# Two sets of four buffer pages, five tables, and some to spare; 2 MiB or less, for image.Image expects one level 3
# table at stage 2, unless pages are huge.
_RAM_PAGES = 16


@dataclass(frozen=True)
class Settings:
    """What of an exploration is configuration (conf/explore). Defaults: the standard small configuration."""

    guest: str = "linux"  # or "bare": registers are written one by one, without a driver
    vcpus: int = 1
    buffer_pages: int = 4
    buffer_mapped: bool = False
    paravirtual: bool = False  # the driver announces its buffers to KVM
    physical_buffer: bool = False  # it gives the SPU physical addresses of a contiguous ring, where that is offered
    sessions: tuple[str, ...] = ("el0_el1", "el0", "el1")
    edits: str = "disabled"
    tlbi: tuple[bool, ...] = (True,)  # edits with TLBI, and without
    host_ops: tuple[str, ...] = ()
    host_targets: tuple[str, ...] = ("buffer", "table")
    in_flight: bool = True
    max_switches: int = 2
    max_renewals: int = 1
    max_edits: int = 1
    max_register_writes: int = 4
    max_host_ops: int = 1
    max_syscalls: int = 2
    max_exits: int = 2
    max_migration_rounds: int = 2
    backing: Backing = Backing.ANONYMOUS
    kernel: Kernel = Kernel.V6_1  # of the host
    migration: MigrationKind = MigrationKind.NONE
    handling: Handling = Handling.PLAIN
    migration_abort: bool = False  # the VMM gives up on an exit because of SPE, instead of holding the vCPU
    memlock_pages: int = 10
    cpu: Cpu = field(default_factory=Cpu)
    irq_delivery: IrqDelivery = IrqDelivery.FORCED_EXIT
    bug: Bug = Bug.NONE


def workload() -> Workload:
    """Return a program of one kind of operation, a load: what is profiled does not matter to an exploration."""
    one = np.ones(1, dtype=np.int64)
    return Workload(
        function_names=("load",),
        distribution_names=("all",),
        op_ps=one,
        alias_threshold=np.zeros((1, 256), np.int64),
        alias_outcome=np.zeros((1, 256, 2), np.int64),
        weight=np.ones((1, 1)),
        outcome_function=0 * one,
        outcome_type=2 * one,
        outcome_events=0b10 * one,
        outcome_latency_cycles=one,
        outcome_spread_cycles=0 * one,
        phase_user=0 * one,
        phase_kernel=0 * one,
        phase_ps=one,
        syscall_gap_ps=one,
        syscall_ps=one,
    )


def _scenario(settings: Settings) -> Scenario:
    ram_pages = _RAM_PAGES
    while ram_pages < 5 + settings.vcpus * (1 + 2 * settings.buffer_pages):
        ram_pages *= 2
    if settings.backing in HUGE:
        ram_pages = 2 * FOLIO  # two huge pages: bench.Bench lays the buffer's first page apart from hot tables
    entries = 1 << (settings.buffer_pages - 1).bit_length()
    return Scenario(
        workload=workload(),
        duration_ps=1 << 60,
        cpu=replace(settings.cpu, tlb_entries=entries, irq_latency_ps=0),
        guest=Guest(
            vcpus=settings.vcpus,
            ram_pages=ram_pages,
            buffer_pages=settings.buffer_pages,
            buffer_mapped=settings.buffer_mapped,
            paravirtual=settings.paravirtual,
            physical_buffer=settings.physical_buffer,
            session=SessionMode.PER_TASK,
            jitter=False,
            task_on_ps=1,
            task_off_ps=1,
            # One row, whose clock never comes: memory is laid out for a guest that edits its tables.
            acts=((int(GuestAct.RESTORE), 0, 0, 0, 1, 0),),
        ),
        kvm=Kvm(
            exit_interval_ps=0,
            preempt_interval_ps=0,
            memlock_pages=settings.memlock_pages,
            irq_delivery=settings.irq_delivery,
            bug=settings.bug,
        ),
        host=Host(backing=settings.backing, kernel=settings.kernel),
        # What a CPU writes is not followed page by page, and time does not matter.
        migration=Migration(
            kind=settings.migration, handling=settings.handling, abort=settings.migration_abort, dirty_bytes_per_us=0
        ),
    )


def _linux_events(settings: Settings, k: int) -> list[Event]:
    events = [Event(Act.OPEN, SESSIONS[name], vcpu=k) for name in settings.sessions]
    events += [
        Event(Act.DRIVER, vcpu=k),
        Event(Act.SYSCALL, vcpu=k, budget=Budget.SYSCALL),
        Event(Act.ERET, vcpu=k),
        Event(Act.VIRQ, vcpu=k),
        Event(Act.READ, vcpu=k),
    ]
    if settings.max_switches:
        events += [Event(Act.SWITCH_OUT, vcpu=k, budget=Budget.SWITCH), Event(Act.SWITCH_IN, vcpu=k)]
    if settings.max_renewals:
        events.append(Event(Act.RENEW, vcpu=k, budget=Budget.RENEW))
    return events


def _bare_events(settings: Settings, k: int) -> list[Event]:
    last = settings.buffer_pages - 1
    events = [Event(Act.WRITE_PMSCR, value, vcpu=k, budget=Budget.REGISTER) for value in (0, 1, 2, 3)]
    events += [Event(Act.ENABLE, page, vcpu=k, budget=Budget.REGISTER) for page in {0, last}]
    events += [Event(act, vcpu=k, budget=Budget.REGISTER) for act in (Act.DISABLE, Act.CLEAR_PMBSR, Act.FORGE_PMBSR)]
    events += [
        Event(Act.WRITE_PMBPTR, page, end, vcpu=k, budget=Budget.REGISTER) for page in {0, last} for end in (0, 1)
    ]
    events += [
        Event(Act.DRAIN, vcpu=k),
        Event(Act.SYSCALL, vcpu=k, budget=Budget.SYSCALL),
        Event(Act.ERET, vcpu=k),
    ]
    return events


def _edit_events(settings: Settings, k: int) -> list[Event]:
    if settings.edits == "never" or not settings.max_edits:
        return []
    pages = range(settings.buffer_pages)
    events = [
        Event(act, page, int(tlbi), vcpu=k, budget=Budget.EDIT)
        for act in (Act.MOVE_PAGE, Act.UNMAP_PAGE, Act.PROTECT_PAGE)
        for page in pages
        for tlbi in settings.tlbi
    ]
    events += [
        Event(act, 0, int(tlbi), vcpu=k, budget=Budget.EDIT)
        for act in (Act.FREE_TABLE, Act.BALLOON_TABLE)
        for tlbi in settings.tlbi
    ]
    return [*events, Event(Act.RESTORE, vcpu=k)]


def _host_events(settings: Settings, k: int) -> list[Event]:
    if not settings.max_host_ops:
        return []
    events = []
    for name in settings.host_ops:
        op = HostOp[name.upper()]
        for target in settings.host_targets:
            pages = (0,) if target == "table" else range(settings.buffer_pages)
            for page in pages:
                events.append(Event(Act.HOST, op, HOST_TARGETS[target], page, k, Budget.HOST))
    return events


def _migration_events(settings: Settings) -> list[Event]:
    acts: Mapping[MigrationKind, tuple[Act, ...]] = {
        MigrationKind.NONE: (),
        MigrationKind.PRECOPY: (Act.MIGRATE_START, Act.MIGRATE_STOP, Act.MIGRATE_RESUME, Act.MIGRATE_CANCEL),
        MigrationKind.POSTCOPY: (Act.MIGRATE_START, Act.MIGRATE_RESUME, Act.MIGRATE_ARRIVE),
    }
    events = [Event(act) for act in acts[settings.migration]]
    if settings.migration is MigrationKind.PRECOPY and settings.max_migration_rounds:
        events.append(Event(Act.MIGRATE_ROUND, budget=Budget.MIGRATION))
    return events


def make_model(settings: Settings, policy: object, name: str) -> Model:
    """Return the model of *settings* under *policy*, an instance of a policy called *name*."""
    events: list[Event] = []
    for k in range(settings.vcpus):
        events += _bare_events(settings, k) if settings.guest == "bare" else _linux_events(settings, k)
        events += _edit_events(settings, k)
        if settings.in_flight:
            events.append(Event(Act.SELECT, vcpu=k))
        events += [Event(Act.WRITE, vcpu=k), Event(Act.IRQ, vcpu=k), Event(Act.TIMER, vcpu=k)]
        if settings.max_exits:
            events.append(Event(Act.EXIT, vcpu=k, budget=Budget.EXIT))
        events += _host_events(settings, k)
    events += _migration_events(settings)
    if settings.bug is not Bug.NONE:
        events.append(Event(Act.BUG, budget=Budget.BUG))
    limits = {
        Budget.SWITCH: settings.max_switches,
        Budget.RENEW: settings.max_renewals,
        Budget.EDIT: settings.max_edits,
        Budget.REGISTER: settings.max_register_writes,
        Budget.HOST: settings.max_host_ops,
        Budget.SYSCALL: settings.max_syscalls,
        Budget.EXIT: settings.max_exits,
        Budget.BUG: 1,
        Budget.MIGRATION: settings.max_migration_rounds,
    }
    return Model(
        scenario=_scenario(settings),
        policy=policy,
        name=name,
        events=tuple(events),
        limits=tuple(limits.get(budget, 0) for budget in Budget),
        bare=settings.guest == "bare",
        edits=EDIT_RULES[settings.edits],
    )
