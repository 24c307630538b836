"""Approach 1 of 2022: pin all of the VM's memory (RFC v3 to v5)."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl


@dataclass
class PinVm:
    """Pin and map all guest memory before the first vCPU runs; treat any stage 2 fault as an error.

    Mechanism: (1) the VMM locks every memslot, KVM pins each page and maps it at stage 2. (2) The guest's buffer
    registers trap, so that KVM can emulate PMBIRQ. (3) A stage 2 fault cannot happen by design; if it does, KVM shows
    the guest an external abort and warns (v5), since it does not know why.
    Source: A. Elisei, RFC v4 and v5, 2021 (kvm.md P2c, error E2); W. Deacon: "pinning all of guest memory is really
    crap".
    Costs: all of the VM's memory counts against RLIMIT_MEMLOCK, page by page, before boot; one trap per PMB* access.
    Fails: MMU notifiers fire for pinned pages too, so NUMA balancing, KSM, fork and mprotect still unmap stage 2.
    """

    raise_memlock: bool = field(
        default=True,
        metadata=doc(
            "the VMM has CAP_IPC_LOCK or a memlock limit as large as the VM; else the limit applies and nothing "
            "is pinned"
        ),
    )

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        vms.pin_all(ignore_limit=self.raise_memlock)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.HOST)
        faults.inject(Event.EXTERNAL_ABORT)
