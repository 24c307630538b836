"""Traces that read like the mails they come from: numbered steps, who acts, what changes in registers and pages.

A trace is a list of events that is run once more, on one lane, with the same machine and hooks that the search used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from spepolicy.arch.registers import (
    EC_IMPDEF,
    EC_OTHER,
    EC_STAGE1,
    EC_STAGE2,
    PMBLIMITR_E,
    PMBSR_DL,
    PMBSR_EA,
    PMBSR_EC_MASK,
    PMBSR_EC_SHIFT,
    PMBSR_S,
)
from spepolicy.explore.acts import SESSION_NAMES, Act, Aux, Event, Target, event_name
from spepolicy.explore.added import AddedProperty, States, added_properties
from spepolicy.explore.bench import Bench
from spepolicy.explore.image import stage2_of
from spepolicy.explore.properties import KINDS, Kind, Property, detail_of, property_of
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.hostpage import EMPTY, FOLIO, FRAME, HOLE, PIN_MASK, PIN_ONE, PRESENT, SHARED
from spepolicy.machine.scenario import ABSENT, MigrationKind
from spepolicy.machine.state import Hook, Segment
from spepolicy.mmu.walker import OA_MASK, S1_READ_ONLY, S2_WRITE, VALID

__all__ = ["Replay", "Step", "replay", "told", "trace_text"]

_EVENT_CLASS = {
    EC_OTHER: "other",
    EC_IMPDEF: "IMPLEMENTATION DEFINED",
    EC_STAGE1: "stage 1 abort",
    EC_STAGE2: "stage 2 abort",
}
_REGISTERS = ("PMSCR_EL1", "PMBPTR_EL1", "PMBLIMITR_EL1", "PMBSR_EL1", "PMBSR_EL1 as the guest reads it", "EL")


@dataclass(frozen=True)
class Step:
    """One event of a trace, and what it did."""

    event: Event
    possible: bool  # False: it could not happen, and was left out
    actor: str = ""
    text: str = ""
    policy: str = ""  # what the policy was asked and what it did
    changes: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    details: tuple[int, ...] = ()  # of each of `kinds`: properties.detail_of
    added: tuple[AddedProperty, ...] = ()  # properties of plugins that do not hold afterwards, and did before


@dataclass
class Replay:
    """A list of events, run under one policy."""

    steps: list[Step] = field(default_factory=list)
    initial: tuple[str, ...] = ()

    def broken(self) -> dict[str, int]:
        """Return the properties that were broken, each with the number of the step, from 1."""
        found: dict[str, int] = {}
        for number, step in enumerate(self.steps, 1):
            for name in (*(property_of(kind).name for kind in step.kinds), *(rule.name for rule in step.added)):
                found.setdefault(name, number)
        return found


def replay(bench: Bench, events: Iterable[Event], cycle: int = 0) -> Replay:
    """Run *events* from the initial state in lane 0 of *bench*. An event that cannot happen is left out, and said to
    be. *cycle*: that many of the last events are a cycle, which is a livelock if it ends where it begins.
    """
    events = list(events)
    bench.put(bench.base)
    before = _State(bench)
    result = Replay(initial=before.lines())
    known = list(bench.model.events)
    rules = added_properties(bench.manager)
    broken: set[AddedProperty] = set()
    hashes = [bench.hash_of(bench.state())]
    for event in events:
        possible = event.act is Act.VM_END or (event in known and bool(bench.possible()[known.index(event)]))
        if not possible:
            result.steps.append(Step(event, False))
            hashes.append(hashes[-1])
            continue
        actor, text = told(bench, event)
        bits, hooks = bench.step(event)
        after = _State(bench)
        kinds = [kind for kind in KINDS if bits >> kind & 1]
        image = bench.state()
        hashes.append(bench.hash_of(image))
        states = States(image[None, :], bench.image)
        now = {rule for rule in rules if rule.check(states)[0]}
        if cycle and len(hashes) == len(events) + 1 and hashes[-1] == hashes[-1 - cycle]:
            kinds.append(Kind.LIVELOCK)
        result.steps.append(
            Step(
                event,
                True,
                actor,
                text,
                _policy_text(bench, hooks, before.pinned),
                before.differences(after),
                tuple(kinds),
                tuple(_detail(bench, kind) for kind in kinds),
                tuple(rule for rule in rules if rule in now - broken),
            )
        )
        before, broken = after, now
    return result


def _detail(bench: Bench, kind: Kind) -> int:
    claim = bench.m.vcpu["claim"][0, bench.m.vm["hook_vcpu"][0]]
    return detail_of(kind, int(bench.aux[0, Aux.LAST_OP]), max(int(claim), 0))


class _State:
    """What a reader of a trace wants to know about lane 0."""

    def __init__(self, bench: Bench) -> None:
        m = bench.m
        self.registers: dict[str, str] = {}
        self.pages: dict[str, str] = {}
        for k in range(bench.image.vcpus):
            v = m.vcpu[0, k]
            prefix = f"vCPU {k} " if bench.image.vcpus > 1 else ""
            limit = int(v["pmblimitr"])
            values = (
                SESSION_NAMES[int(v["pmscr"]) & 3] + " {E0SPE,E1SPE}",
                _offset(int(v["pmbptr"]), int(v["buffer_va"])),
                f"LIMIT {_offset(limit & ~0xFFF, int(v['buffer_va']))}, E={limit & PMBLIMITR_E}" if limit else "0",
                syndrome_text(int(v["pmbsr"])),
                syndrome_text(int(v["guest_pmbsr"])),
                str(int(v["level"])),
            )
            self.registers |= {prefix + name: value for name, value in zip(_REGISTERS, values, strict=True)}
            for n in range(bench.image.buffer_pages):
                self.pages[f"{prefix}buffer page {n}"] = _page_text(bench, k, n)
        self.pinned = int(m.vm["pinned_pages"][0])
        self.pages["pages pinned"] = str(self.pinned)

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{name}: {value}" for name, value in (*self.registers.items(), *self.pages.items()))

    def differences(self, after: _State) -> tuple[str, ...]:
        old, new = self.registers | self.pages, after.registers | after.pages
        return tuple(f"{name}: {old[name]} -> {new[name]}" for name in new if new[name] != old[name])


def _offset(address: int, buffer: int) -> str:
    if address == 0:
        return "0"
    return f"buffer + {address - buffer:#x}"


def syndrome_text(value: int) -> str:
    """Return PMBSR_EL1 as text: the fields that say something."""
    if not value & PMBSR_S:
        return f"{value:#x}" if value else "0"
    ec = (value & PMBSR_EC_MASK) >> PMBSR_EC_SHIFT
    parts = ["S=1", f"EC {ec:#04x} ({_EVENT_CLASS.get(ec, 'reserved')})"]
    if ec in (EC_STAGE1, EC_STAGE2):
        parts.append(f"FSC {value & 0x3F:#04x}")
    elif ec == EC_OTHER and value & 0x3F == 1:
        parts.append("buffer full")
    parts += [f"{name}=1" for name, bit in (("DL", PMBSR_DL), ("EA", PMBSR_EA)) if value & bit]
    return " ".join(parts)


def _page_text(bench: Bench, k: int, n: int) -> str:
    m, image = bench.m, bench.image
    at = image.pool_at[image.leaf1[k, n] - image.offset("pool")]
    leaf = int(m.pool[0].reshape(-1)[at])
    if not leaf & VALID:
        return "not mapped by the guest"
    page = ((leaf & OA_MASK) >> 12) - int(m.par["ram_page0"][0])
    text = f"IPA page {page}{', read-only' if leaf & S1_READ_ONLY else ''}"
    if not 0 <= page < m.host_page.shape[1]:
        return f"IPA page {page:#x}, outside RAM"
    return f"{text}: {_backing_text(bench, page)}"


def _backing_text(bench: Bench, page: int) -> str:
    """Say what stage 2 and the host have for a guest page."""
    m = bench.m
    word = int(m.host_page[0, page])
    parts = []
    if bench.behaviour.virtualized:
        found = np.zeros(2, dtype=np.int64)
        stage2_of(bench.handle, page, found)
        leaf, level = int(found[0]), int(found[1])
        frame = ((leaf & OA_MASK) >> 12) + (page % FOLIO if level == 2 else 0)
        if not leaf & VALID:
            parts.append("not mapped at stage 2")
        elif frame != word & FRAME:
            parts.append("stage 2 shows a page that the host has replaced")
        else:
            mapped = "mapped at stage 2" + (" by a block" if level == 2 else "")
            parts.append(mapped + ("" if leaf & S2_WRITE else " read-only"))
    if pins := (word & PIN_MASK) // PIN_ONE:
        parts.append("pinned" if pins == 1 else f"pinned {pins} times")
    if word & HOLE:
        parts.append("no memory behind it")
    elif word & EMPTY:
        parts.append("discarded by the VMM")
    elif m.dirty.shape[1] > page and m.dirty[0, page] & ABSENT:
        parts.append("still at the source")
    elif not word & PRESENT:
        parts.append("swapped out")
    elif word & SHARED:
        parts.append("shared by the host")
    return ", ".join(parts)


# ---- who does what ---------------------------------------------------------------------------------------------------

_GUEST, _SPU, _KVM, _HOST = "guest", "SPU", "KVM", "host"

_DRIVER = {
    Segment.START: "arm_spe_pmu_start(): programs PMBPTR_EL1 and enables the buffer, PMBLIMITR_EL1.E=1",
    Segment.START_SAMPLING: "arm_spe_pmu_start(): writes PMSCR_EL1 and goes back to the program",
    Segment.STOP: "arm_spe_pmu_stop(): disables the buffer, PMBLIMITR_EL1.E=0",
    Segment.IRQ_ENTRY: "arm_spe_pmu_irq_handler(): reads PMBSR_EL1 and deals with the event",
    Segment.IRQ_HANDLER: "arm_spe_pmu_irq_handler() returns",
}

_DRAINS = ", PSB CSYNC, DSB"

_PLAIN = {
    Act.SYSCALL: (_GUEST, "the program makes a system call: exception entry to EL1"),
    Act.ERET: (_GUEST, "ERET to EL0"),
    Act.SWITCH_OUT: (_GUEST, "the scheduler takes the profiled task off the CPU: PMSCR_EL1=0" + _DRAINS),
    Act.SWITCH_IN: (_GUEST, "the scheduler puts the profiled task on the CPU"),
    Act.RENEW: (_GUEST, "perf ends its session: PMSCR_EL1=0" + _DRAINS + "; another session is to follow"),
    Act.VIRQ: (_GUEST, "takes its PMBIRQ: exception entry to EL1"),
    Act.READ: (_GUEST, "perf reads the AUX ring"),
    Act.RESTORE: (_GUEST, "maps all of its buffer again"),
    Act.DISABLE: (_GUEST, "writes PMBLIMITR_EL1.E=0"),
    Act.CLEAR_PMBSR: (_GUEST, "writes PMBSR_EL1=0"),
    Act.FORGE_PMBSR: (_GUEST, "writes PMBSR_EL1.S=1 by itself"),
    Act.DRAIN: (_GUEST, "PSB CSYNC, DSB"),
    Act.SELECT: (_SPU, "selects an operation, which is in flight"),
    Act.IRQ: (_KVM, "PMBIRQ: the vCPU exits"),
    Act.EXIT: (_KVM, "an exit that SPE is not the reason of: vCPU put and load, SPE is drained"),
    Act.VM_END: (_HOST, "the VM is destroyed"),
    Act.TIMER: (_KVM, "the policy's timer fires"),
    Act.BUG: (_KVM, "the injected bug strikes the next time that it can"),
    Act.MIGRATE_ROUND: (_HOST, "migration: the pages of the round are sent; the dirty log is read, and protects again"),
    Act.MIGRATE_STOP: (_HOST, "migration: the dirty log is read for the last time, the vCPUs stop, SPE is drained"),
    Act.MIGRATE_RESUME: (_HOST, "migration: the vCPUs run on the target; stage 2 is empty, nothing is pinned"),
    Act.MIGRATE_ARRIVE: (_HOST, "migration: the pages that nobody had asked for have arrived"),
    Act.MIGRATE_CANCEL: (_HOST, "migration: the VMM gives up, the guest goes on at the source"),
}
_EDITS = {
    Act.MOVE_PAGE: "puts another page, which no CPU has touched, behind page {n} of its buffer",
    Act.UNMAP_PAGE: "unmaps page {n} of its buffer",
    Act.PROTECT_PAGE: "write-protects page {n} of its buffer",
    Act.FREE_TABLE: "unlinks the stage 1 table that reaches its buffer",
    Act.BALLOON_TABLE: "gives the page of the stage 1 table that reaches its buffer to the balloon",
}


def told(bench: Bench, event: Event) -> tuple[str, str]:
    """Return (who acts, what happens) for *event* in the state of lane 0."""
    v = bench.m.vcpu[0, event.vcpu]
    if event.act in (Act.SWITCH_OUT, Act.RENEW) and bench.behaviour.hooks >> Hook.PROFILING_DISABLED & 1:
        actor, text = _PLAIN[event.act]
        return actor, text.replace(_DRAINS, "")  # an event of its own
    if event.act in _PLAIN:
        return _PLAIN[event.act]
    if event.act is Act.MIGRATE_START:
        if bench.model.scenario.migration.kind == MigrationKind.POSTCOPY:
            return _HOST, "migration: the VMM stops the vCPUs at once; memory is to follow (post-copy)"
        return _HOST, "migration: the dirty log goes on, stage 2 is write-protected, all pages are sent"
    if event.act is Act.OPEN:
        driver = _DRIVER[Segment.START]
        return _GUEST, f"perf opens a session with {{E0SPE,E1SPE}} = {SESSION_NAMES[event.a]}. {driver}"
    if event.act is Act.DRIVER and v["drain_due"]:
        return _GUEST, "arm_spe_pmu_stop(): PSB CSYNC, DSB"
    if event.act is Act.DRIVER:
        return _GUEST, _DRIVER[Segment(int(v["segment"]))]
    if event.act in _EDITS:
        tlbi = "TLBI" if event.b else "no TLBI"
        return _GUEST, f"{_EDITS[event.act].format(n=event.a)} ({tlbi})"
    if event.act is Act.WRITE_PMSCR:
        return _GUEST, f"writes PMSCR_EL1: {{E0SPE,E1SPE}} = {SESSION_NAMES[event.a]}"
    if event.act is Act.ENABLE:
        return _GUEST, f"writes PMBLIMITR_EL1: LIMIT after page {event.a}, E=1"
    if event.act is Act.WRITE_PMBPTR:
        return _GUEST, f"writes PMBPTR_EL1: {'just below the end' if event.b else 'start'} of page {event.a}"
    if event.act is Act.HOST:
        op = HostOp(event.a).name.lower()
        page = {
            Target.BUFFER: f"the page behind page {event.c} of the buffer",
            Target.FORMER: f"the page that was behind page {event.c} of the buffer",
            Target.TABLE: "the page of the stage 1 table that reaches the buffer",
        }[Target(event.b)]
        return _HOST, f"{op} on {page}"
    assert event.act is Act.WRITE
    page_number = (int(v["pmbptr"]) - int(v["buffer_va"])) >> 12
    return _SPU, f"writes to page {page_number} of the buffer at EL{int(v['level'])}"


_POLICY_DID = (
    ("injected_impdef", "tells the guest an IMPLEMENTATION DEFINED event"),
    ("injected_external", "tells the guest an external abort"),
    ("injected_stage1", "tells the guest a stage 1 abort"),
    ("injected_stage2", "tells the guest the stage 2 abort"),
)


def _policy_text(bench: Bench, hooks: Sequence[Hook], pinned: int) -> str:
    """Say which hooks were called and what came of them, from what the last step counted. *pinned*: pages, before."""
    if not hooks:
        return ""
    m = bench.m
    vm, lane = m.vm[0], m.truth[0]
    did = []
    if vm["pin_refused"]:
        did.append(f"cannot pin {int(vm['pin_refused'])} pages within the memlock limit")
    if vm["pin_calls"]:
        did.append(f"pins {int(vm['pin_calls'])} pages")
    if unpinned := pinned + int(vm["pin_calls"]) - int(vm["pinned_pages"]):
        did.append(f"unpins {unpinned} pages")
    if vm["stage2_maps"]:
        did.append(f"maps {int(vm['stage2_maps'])} at stage 2")
    for counter, text in _POLICY_DID:
        if lane[counter].any():
            did.append(text)
    v = m.vcpu[0, int(vm["hook_vcpu"])]
    if Hook.STAGE2_FAULT in hooks and v["answered"] == 1:
        did.append("clears PMBSR_EL1.S and resumes")
    names = ", ".join(hook.name.lower() for hook in hooks)
    return f"{bench.model.name} is asked ({names}): {'; '.join(did) or 'it does nothing'}"


# ---- text ------------------------------------------------------------------------------------------------------------


def trace_text(run: Replay, title: str, cycle: int = 0) -> str:
    """Return a replay as numbered steps."""
    lines = [title, "", "At the start:"]
    lines += [f"    {line}" for line in run.initial]
    lines.append("")
    begin = len(run.steps) - cycle
    for number, step in enumerate(run.steps, 1):
        if cycle and number == begin + 1:
            lines.append(f"  The next {cycle} steps repeat for ever:")
        if not step.possible:
            lines.append(f"{number:3d}. ({event_name(step.event)}: cannot happen here, left out)")
            continue
        lines.append(f"{number:3d}. {step.actor}: {step.text}")
        if step.policy:
            lines.append(f"       KVM: {step.policy}")
        lines += [f"       {line}" for line in step.changes]
        told: list[tuple[str, Property | AddedProperty]] = [
            (KINDS[kind].text, property_of(kind)) for kind in step.kinds
        ]
        told += [("it does not hold", rule) for rule in step.added]
        for text, rule in told:
            lines.append(f"     * {rule.name} is broken: {text}.")
            lines.append(f"       Rule: {rule.rule}. Source: {rule.source}.")
    return "\n".join(lines) + "\n"
