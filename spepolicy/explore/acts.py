"""Names and numbers of what can happen in an exploration, shared by compiled code, configuration and traces.

An *act* is one step of the machine without a clock: `explore` tries each that can come next, `simulate` draws one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from spepolicy.machine.hostops import HostOp

__all__ = [
    "ACTS",
    "SESSION_NAMES",
    "Act",
    "Aux",
    "Budget",
    "Event",
    "FaultPage",
    "Taint",
    "Target",
    "event_name",
    "parse_event",
]


class Act(IntEnum):
    """What can happen next."""

    OPEN = 0  # perf opens a session: a is {E1SPE,E0SPE}; the driver sets the buffer up
    DRIVER = 1  # the guest's SPE driver goes on to the end of its segment
    SYSCALL = 2  # exception entry from EL0: system call
    ERET = 3  # ERET to EL0
    SWITCH_OUT = 4  # the scheduler takes the profiled task off the CPU
    SWITCH_IN = 5
    RENEW = 6  # perf ends its session and opens another, with new AUX pages
    VIRQ = 7  # the guest takes its PMBIRQ
    READ = 8  # perf reads the AUX ring
    MOVE_PAGE = 9  # the guest backs buffer page a by another page, which no CPU has touched; b: with TLBI
    UNMAP_PAGE = 10  # the guest unmaps buffer page a
    PROTECT_PAGE = 11  # the guest write-protects buffer page a
    FREE_TABLE = 12  # the guest unlinks the stage 1 table that reaches the buffer
    BALLOON_TABLE = 13  # the guest gives the page of that table to the balloon while it is linked
    RESTORE = 14  # the guest maps all of its buffer again
    WRITE_PMSCR = 15  # a bare guest writes PMSCR_EL1 = a
    ENABLE = 16  # a bare guest writes PMBLIMITR_EL1: LIMIT after page a, E=1
    DISABLE = 17  # a bare guest writes PMBLIMITR_EL1.E=0
    WRITE_PMBPTR = 18  # a bare guest writes PMBPTR_EL1: start of page a, or with b a position just below its end
    CLEAR_PMBSR = 19  # a bare guest writes PMBSR_EL1=0
    FORGE_PMBSR = 20  # a bare guest writes PMBSR_EL1.S=1 by itself
    DRAIN = 21  # a bare guest's PSB CSYNC and DSB
    SELECT = 22  # the SPU selects an operation, which stays in flight
    WRITE = 23  # the SPU writes: the first record of a page, those that still fit into it, or one across its end
    IRQ = 24  # the physical PMBIRQ reaches KVM
    EXIT = 25  # an exit that SPE is not the reason of, or a preemption: vCPU put and load
    HOST = 26  # host operation a (HostOp) on the page that b (Target) names, page c of the buffer
    VM_END = 27  # the VM is destroyed
    TIMER = 28  # the policy's timer fires
    BUG = 29  # the injected bug of KVM strikes the next time that it can
    MIGRATE_START = 30  # the VMM begins to migrate: the dirty log goes on, or for post-copy the vCPUs stop
    MIGRATE_ROUND = 31  # pre-copy: the pages of a round are sent, the log is read and cleared
    MIGRATE_STOP = 32  # the same, and the vCPUs stop for the rest
    MIGRATE_RESUME = 33  # the vCPUs run on the target, whose stage 2 is empty
    MIGRATE_ARRIVE = 34  # post-copy: what was not fetched on demand has arrived
    MIGRATE_CANCEL = 35  # the VMM gives up, the guest goes on at the source


class Target(IntEnum):
    """The page that a host operation hits."""

    BUFFER = 0  # page c of the buffer as stage 1 maps it now
    FORMER = 1  # the page that stood behind page c of the buffer before
    TABLE = 2  # the page of the stage 1 table of level 3 that reaches the buffer


class Budget(IntEnum):
    """What is bounded: how often an act of this class may happen on one path."""

    NONE = 0  # no bound
    SWITCH = 1
    RENEW = 2
    EDIT = 3
    REGISTER = 4
    HOST = 5  # in all; each kind of operation at most once
    SYSCALL = 6
    EXIT = 7
    BUG = 8
    MIGRATION = 9  # rounds of pre-copy


class Taint(IntFlag):
    """What has happened on a path: who can be blamed, and what a claim may be."""

    OPENED = 1  # a session is open on vCPU 0
    ENDED = 2  # the VM is gone
    HOST = 4  # the host changed something about a page
    EDITED = 8  # the guest changed its translations as the Arm ARM allows
    UNLAWFUL = 16  # the guest broke a rule of the Arm ARM
    BUG = 32  # KVM has a bug switched on
    MIGRATED = 64
    NO_LIMIT = 128  # the VMM lifted the memlock limit before boot
    OPENED_1 = 256  # a session is open on vCPU 1


class Aux(IntEnum):
    """Words of a state that are not the machine's."""

    TAINT = 0
    LAST_OP = 1  # the host operation that came last
    OPS_DONE = 2  # mask of host operations that have happened
    BLACK = 3  # mask of vCPUs where profiling is wanted and off since an earlier act
    FAULT = 4  # what was true of the page when a fault came that KVM has not answered yet: FaultPage, 4 bits a vCPU
    HELD = 5  # pages pinned at a write that disabled profiling, until the guest has drained: 16 bits a vCPU
    SPENT = 6  # SPENT + Budget: how much of it is used up; the last words
    END = 6 + len(Budget)


class FaultPage(IntFlag):
    """The page behind a stage 2 fault, as it was when the SPU stopped."""

    PINNED = 1  # KVM held it pinned
    LISTED = 2  # KVM's list said so, but a bug had left it out
    ABSENT = 4  # post-copy: it was still at the source
    LET_GO = 8  # KVM let go of it at the write that disabled profiling, and the guest had not drained


@dataclass(frozen=True)
class Event:
    """One thing that can happen: an act with its arguments, of one vCPU."""

    act: Act
    a: int = 0
    b: int = 0
    c: int = 0
    vcpu: int = 0
    budget: Budget = Budget.NONE


ACTS = len(Act)
SESSION_NAMES = {3: "{1,1}", 1: "{1,0}", 2: "{0,1}", 0: "{0,0}"}  # by PMSCR_EL1 bits 1:0, shown as {E0SPE,E1SPE}

_TARGETS = {Target.BUFFER: "buffer", Target.FORMER: "former", Target.TABLE: "table"}
_WITH_PAGE = (Act.MOVE_PAGE, Act.UNMAP_PAGE, Act.PROTECT_PAGE)
_ON_TABLE = (Act.FREE_TABLE, Act.BALLOON_TABLE)


def event_name(event: Event) -> str:
    """Return the name of *event* in traces and scenario files, for example `host numa_scan buffer 1`."""
    act = event.act
    words = [act.name.lower()]
    if act in (Act.OPEN, Act.WRITE_PMSCR):
        words.append(SESSION_NAMES[event.a])
    elif act in _WITH_PAGE:
        words += [str(event.a)] + ([] if event.b else ["no_tlbi"])
    elif act in _ON_TABLE:
        words += [] if event.b else ["no_tlbi"]
    elif act is Act.ENABLE:
        words.append(str(event.a))
    elif act is Act.WRITE_PMBPTR:
        words += [str(event.a)] + (["end"] if event.b else [])
    elif act is Act.HOST:
        words += [HostOp(event.a).name.lower(), _TARGETS[Target(event.b)]]
        if event.b != Target.TABLE:
            words.append(str(event.c))
    if event.vcpu:
        words.append(f"vcpu {event.vcpu}")
    return " ".join(words)


def parse_event(name: str, events: tuple[Event, ...]) -> Event | None:
    """Return the event of *events* that is called *name*, None if there is none."""
    wanted = " ".join(name.split())
    return next((event for event in events if event_name(event) == wanted), None)
