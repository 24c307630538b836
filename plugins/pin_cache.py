"""January 2026: keep the pins while the buffer is disabled, and find a rule to let them go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spepolicy.arch.registers import PMBLIMITR_E
from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl
from spepolicy.machine.hostops import Notifier

from .pinning import CLAIMS_DOC, NOTIFIERS, NOTIFIERS_DOC, TABLES_DOC, claim, keep, pin_buffer, still_enabled

PAGE = np.uint64(0x1000)


@dataclass
class PinCache:
    """Pin when the buffer is enabled, as RFC v6, but keep what is pinned for the next time.

    Mechanism: (1) PMB* trap. (2) At a write that enables the buffer KVM compares it with what it holds pinned. By range
    a hit is a buffer inside of it, and a buffer that overlaps or adjoins it makes it grow, up to max_pinned_KiB; by
    registers, a hit is the same PTR and LIMIT. A miss walks and pins, and drops the pins before. (3) At E=0 nothing
    happens at once. release says when pins go: at need, that is when a pin hits the memlock limit, from the VM's other
    vCPUs that do not profile; by timer, some time after the buffer was disabled; by ageing, if two ticks passed without
    an enable. (4) A stage 2 fault with DL=0 is taken for a stale pin: the buffer is pinned anew.
    (5) The target of a migration begins with an empty cache: a buffer that is enabled is pinned there before the guest
    runs, as KVM_SET_ONE_REG enables it; others when they are enabled next.
    Source: J. Clark, 9 Jan 2026, and A. Elisei, 12 Jan 2026 (kvm.md P9a to P9d); keyed by range since Linux programs
    another PTR and LIMIT at each start.
    Needs: a software walk of stage 1, a notifier change; a timer for two of the releases.
    Costs: a trap and a comparison per enable where it hits; locked memory while nobody profiles.
    Fails: KVM does not know whether the guest changed its tables while the buffer was disabled: a stale pin shows as a
    fault if the new page is not mapped, and otherwise as an unpinned page that the host may take.
    """

    key: str = field(
        default="range",
        metadata=doc("a hit is a buffer inside the pinned 'range', or one with equal 'registers'",
                     choices=("range", "registers"), source="kvm.md section 5"),
    )  # fmt: skip
    release: str = field(
        default="need",
        metadata=doc("when pins of a disabled buffer go: at 'need', by 'timer', or by 'ageing'",
                     choices=("need", "timer", "ageing"), source="kvm.md P9b to P9d"),
    )  # fmt: skip
    release_after_us: int = field(
        default=10_000,
        metadata=doc("timer, or length of an ageing tick", unit="us", minimum=1, maximum=1_000_000),
    )
    max_pinned_KiB: int = field(
        default=16_384,
        metadata=doc("a set grows no further than this", unit="KiB", minimum=4, maximum=1 << 20, source="kvm.md P9e"),
    )
    pin_stage1_tables: bool = field(default=True, metadata=TABLES_DOC)
    notifiers: str = field(default="finer", metadata=NOTIFIERS_DOC)
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    State = np.dtype([("ptr", "u8"), ("limit", "u8"), ("idle_ticks", "u1"), ("ticking", "u1")])

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return NOTIFIERS[self.notifiers]

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        vcpus.state["idle_ticks"] = 0
        if self.release == "timer":
            vcpus.set_timer(None)
        elif self.release == "ageing":
            idle = vcpus.where(vcpus.state["ticking"] == 0)
            idle.set_timer(self.release_after_us * 1000)
            idle.state["ticking"] = 1
        lo, hi, held = vcpus.buffer_lo, vcpus.buffer_hi, vcpus.pinned_pages > 0
        if self.key == "registers":
            hit = held & (vcpus.state["ptr"] == vcpus.pmbptr) & (vcpus.state["limit"] == vcpus.pmblimitr)
            self._pin(vcpus.where(~hit), lo[~hit], hi[~hit], grow=False)
            vcpus.state["ptr"], vcpus.state["limit"] = vcpus.pmbptr, vcpus.pmblimitr
            return
        first, last = vcpus.pinned_lo, vcpus.pinned_hi
        hit = held & (lo >= first) & (hi <= last)
        touches = held & ~hit & (lo <= last) & (hi >= first)
        within = np.maximum(hi, last) - np.minimum(lo, first) <= np.uint64(self.max_pinned_KiB << 10)
        above, below = touches & within & (lo >= first), touches & within & (lo < first) & (hi <= last)
        self._pin(vcpus.where(above), last[above], hi[above], grow=True)
        self._pin(vcpus.where(below), lo[below], first[below], grow=True)
        anew = ~(hit | above | below)
        self._pin(vcpus.where(anew), lo[anew], hi[anew], grow=False)

    def _pin(self, vcpus: Vcpus, lo: Any, hi: Any, *, grow: bool) -> None:
        """Pin [lo, hi) of each vCPU; where the limit forbids, let other vCPUs' idle pins go and try once more."""
        walk = vcpus.walk_stage1(lo, hi, pin_tables=self.pin_stage1_tables)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        keep(pinned, grow=grow)
        short = pinned.over_limit
        if len(short):
            # Its own old set goes first, then those of vCPUs that do not profile.
            short.unpin()
            short.release_idle_pins()
            pin_buffer(short, self.pin_stage1_tables)

    @hookimpl
    def migration_finished(self, vcpus: Vcpus) -> None:
        self.buffer_enabled(still_enabled(vcpus))  # a hit where the migration was given up and pins are held

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        if self.release == "timer":
            vcpus.set_timer(self.release_after_us * 1000)

    @hookimpl
    def timer(self, vcpus: Vcpus) -> None:
        enabled = vcpus.pmblimitr & PMBLIMITR_E != 0
        if self.release == "timer":
            vcpus.where(~enabled).unpin()
            return
        idle = np.where(enabled, 0, vcpus.state["idle_ticks"] + 1)
        vcpus.state["idle_ticks"] = idle
        gone = idle >= 2
        vcpus.where(gone).unpin()
        vcpus.where(gone).state["ticking"] = 0
        vcpus.where(~gone).set_timer(self.release_after_us * 1000)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        claim(faults, self.claims, Cause.HOST)
        stale = faults.where(~faults.data_loss)
        pin_buffer(stale, self.pin_stage1_tables).resume()
        faults.where(faults.data_loss).inject(Event.IMPDEF, data_loss=True)
