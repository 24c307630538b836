"""RFC v3: the VMM locks all memory, and KVM maps it before the first vCPU runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl


@dataclass
class MlockFinalize:
    """The VMM mlock()s guest RAM, and the FINALIZE ioctl maps it all at stage 2 before boot.

    Mechanism: (1) the VMM raises RLIMIT_MEMLOCK and locks all guest RAM. (2) KVM_ARM_VM_SPE_CTRL/FINALIZE faults every
    locked page in and maps it, writable. (3) Nothing is pinned: VM_LOCKED keeps pages resident, no more. (4) A stage 2
    fault cannot happen by design; if it does the guest sees an external abort.
    Source: A. Elisei, RFC v3, 27 Oct 2020 (kvm.md P2a); J. Morse's review of 19 Nov 2020.
    Needs: a VMM that locks its memory, and a memlock limit as large as the VM.
    Costs: all of the VM's memory resident and locked; stage 2 built before boot; one trap per PMB* access.
    Fails: mlock() does not keep a page where it is: compaction, migration, KSM, NUMA balancing, THP and fork move or
    unmap it, and nothing maps it again for the SPU ("mlock() alone is not enough", P:ec4a346d).
    """

    raise_memlock: bool = field(
        default=True, metadata=doc("the VMM's memlock limit is as large as the VM; else the limit applies")
    )

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        vms.mlock_all(ignore_limit=self.raise_memlock)
        vms.map_all()

    @hookimpl
    def migration_finished(self, vms: Vms) -> None:
        vms.mlock_all(ignore_limit=self.raise_memlock)
        vms.map_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.HOST)
        faults.inject(Event.EXTERNAL_ABORT)
