"""Approach 3 of 2022: pin the buffer when profiling becomes enabled."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl
from spepolicy.machine.hostops import Notifier


@dataclass
class EagerPin:
    """Pin the guest's buffer when profiling becomes enabled; unpin it when the next one is pinned.

    Mechanism: (1) PMB* and PMS* trap. (2) When a write makes the buffer and E1SPE enabled, KVM walks stage 1 from
    PMBPTR to PMBLIMITR.LIMIT, pins those pages and maps them. (3) Only then the previous buffer's pages are unpinned,
    for a drain may still write to them when profiling is switched off. (4) A later stage 2 fault means that the
    emulation does not work: IMPLEMENTATION DEFINED event with DL.
    Source: kvm.md P4; W. Deacon 19 Apr 2022, A. Elisei 2 Aug to 13 Sep 2022. keep_mapped is his of 12 Aug 2022.
    Costs: a trap per register access; a walk, a pin and a map per page at each enabling write; locked memory.
    Fails: {E0SPE,E1SPE} = {1,0} becomes enabled by an ERET that KVM does not see; notifiers unmap pinned pages;
    memlock.
    """

    pin_stage1_tables: bool = field(
        default=False, metadata=doc("also pin the guest's stage 1 tables on the way to the buffer")
    )
    keep_mapped: bool = field(
        default=False,
        metadata=doc("ignore every MMU notifier event but UNMAP for pinned pages: fewer faults, silent divergence"),
    )
    el0_only: str = field(
        default="error",
        metadata=doc(
            "a first fault with {E0SPE,E1SPE} = {1,0}: 'error' (not supported, a documented erratum) or "
            "'first_fault' (pin then)",
            choices=("error", "first_fault"),
        ),
    )

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return ~Notifier.UNMAP if self.keep_mapped else Notifier(0)

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        self._pin(vcpus)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        user_only = (faults.pmscr & 0b11) == 0b01
        late = faults.where(user_only & (self.el0_only == "first_fault"))
        late.claim(Cause.NOT_PINNED)
        self._pin(late).resume()
        rest = faults.where(~(user_only & (self.el0_only == "first_fault")))
        rest.claim(Cause.HOST)
        rest.inject(Event.IMPDEF, data_loss=True)

    def _pin(self, vcpus: Vcpus) -> Vcpus:
        """Pin [PMBPTR, LIMIT) and drop what was pinned before; tell the guest where that fails. Return the vCPUs where
        it worked.
        """
        walk = vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi, pin_tables=self.pin_stage1_tables)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
        pinned.no_page.inject(Event.IMPDEF, data_loss=True)
        pinned.ok.unpin_previous()
        return pinned.ok
