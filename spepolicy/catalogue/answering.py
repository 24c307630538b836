"""A policy that repairs every fault and then gives the answer that a case of the catalogue is about (kvm.md 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

from spepolicy.batch import Vcpus, Vms, WalkedVcpus
from spepolicy.hookspecs import Cause, Event, Failure, Trap, hookimpl

__all__ = ["ANSWERS", "Answering"]

# Answer -> what the guest is told or KVM does, and whether DL is set. E9, an exit to the VMM, is not in it.
ANSWERS: dict[str, tuple[Event | Failure, bool]] = {
    "E1": (Event.STAGE2_ABORT, False),
    "E2": (Event.EXTERNAL_ABORT, False),
    "E3": (Failure.SERROR, False),
    "E4": (Event.IMPDEF, True),
    "E5": (Failure.DISABLE, False),
    "E6": (Failure.RUN_ERROR, False),
    "E7": (Failure.IGNORE, False),
    "E8": (Event.TOO_LARGE, False),
    "E10": (Failure.COLLISION, False),
    "E11": (Failure.HOST_PANIC, False),
    "E12": (Failure.SIDEBAND, False),
}


@dataclass
class Answering:
    """Map what faulted, so that only the answer matters; E9 pins, and asks the VMM to raise the limit where it must."""

    answer: str

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.NOT_PINNED)
        walk = faults.walk_stage1(faults.buffer_lo, faults.buffer_hi)
        walk.failed.inject(Event.STAGE1_ABORT)
        if self.answer == "E9":
            _raise_limit(walk.ok)
            return
        walk.ok.map()
        answer, data_loss = ANSWERS[self.answer]
        if isinstance(answer, Event):
            walk.ok.inject(answer, data_loss=data_loss)
        else:
            walk.ok.fail(answer)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()


def _raise_limit(faults: WalkedVcpus) -> None:
    """Pin; where RLIMIT_MEMLOCK forbids it exit to the VMM, which raises the limit and runs the vCPU again."""
    pinned = faults.pin()
    pinned.ok.unpin_previous()
    pinned.ok.resume()
    short = pinned.over_limit
    short.exit_to_vmm()
    again = short.walk_stage1(short.buffer_lo, short.buffer_hi).ok.pin(ignore_limit=True)
    again.ok.unpin_previous()
    again.ok.resume()
