"""The hybrid of August 2022: approach 4, with its fault handler also called when the guest sets E1SPE."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, hookimpl

from .pin_on_fault import pin_buffer_and_resume
from .pinning import CLAIMS_DOC, TABLES_DOC, claim


@dataclass
class SyntheticFault:
    """Pin at the first stage 2 fault, and treat the write that enables profiling at EL1 as such a fault.

    Mechanism: (1) when a trapped write enables profiling at EL1, KVM calls its SPE fault handler on PMBPTR before the
    guest goes on: walk, pin, map, unpin the previous buffer. (2) Real stage 2 faults go to the same handler. (3) An
    EL0-only session keeps the hardware's first fault.
    Source: kvm.md P6; O. Upton 2 and 9 Aug 2022, "if folks complain about EL1 profile blackout".
    Needs: a software walk of stage 1.
    Costs: those of pin_on_fault plus a trap per PMS* access, and a walk and pin at each enabling write.
    Fails: as pin_on_fault; pinning does not stop the notifiers, but a fault with DL=0 is repaired.
    """

    pin_stage1_tables: bool = field(default=True, metadata=TABLES_DOC)
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        pin_buffer_and_resume(vcpus, self.pin_stage1_tables)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        claim(faults, self.claims, Cause.NOT_PINNED)
        pin_buffer_and_resume(faults.where(~faults.data_loss), self.pin_stage1_tables)
        faults.where(faults.data_loss).inject(Event.IMPDEF, data_loss=True)
