"""Approach 4 of 2022: pin the buffer at the first stage 2 fault."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl


def pin_buffer_and_resume(faults: Vcpus, pin_stage1_tables: bool) -> None:
    """Walk and pin [PMBPTR, LIMIT), unpin the buffer before, and let the SPU go on; tell the guest where that fails."""
    walk = faults.walk_stage1(faults.buffer_lo, faults.buffer_hi, pin_tables=pin_stage1_tables)
    walk.failed.inject(Event.STAGE1_ABORT)
    pinned = walk.ok.pin()
    pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
    pinned.no_page.inject(Event.IMPDEF, data_loss=True)
    pinned.ok.unpin_previous()
    pinned.ok.resume()


@dataclass
class PinOnFault:
    """Do nothing until the SPU faults at stage 2; then pin what is left of the buffer and go on.

    Mechanism: (1) the first record that hits an unmapped page stops the SPU. (2) On the exit KVM walks stage 1 from
    PMBPTR to LIMIT, pins and maps those pages, and unpins those of the previous fault. (3) PMBSR.S is cleared, the SPU
    goes on. A fault with DL=1 is an error unless nothing was recorded before, which KVM cannot know: it tells the
    guest.
    Source: kvm.md P5; O. Upton 2 and 17 Aug 2022 ("non-destructive": repin while DL=0).
    Costs: one gap and one exit per fault; pins only guests that profile; one trap per PMB* access.
    Fails: a legitimate first fault cannot be told from a bug in KVM (A. Elisei, 9 Aug 2022).
    """

    pin_stage1_tables: bool = field(
        default=True, metadata=doc("also pin the guest's stage 1 tables on the way to the buffer")
    )

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.NOT_PINNED)
        pin_buffer_and_resume(faults.where(~faults.data_loss), self.pin_stage1_tables)
        faults.where(faults.data_loss).inject(Event.IMPDEF, data_loss=True)
