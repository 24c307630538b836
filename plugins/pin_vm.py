"""Approach 1 of 2022: pin all of the VM's memory (RFC v4 and v5), with the memslot flag and VFIO as variants."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Platform, Trap, doc, hookimpl
from spepolicy.machine.hostops import Notifier


@dataclass
class PinVm:
    """Pin and map all guest memory before the first vCPU runs; treat any stage 2 fault as an error.

    Mechanism: (1) the VMM locks every memslot, KVM pins each page (FOLL_LONGTERM) and maps it at stage 2. (2) The
    guest's buffer registers trap, so that KVM can emulate PMBIRQ. (3) A stage 2 fault cannot happen by design; if it
    does, KVM shows the guest an external abort and warns (v5), since it does not know why.
    Source: A. Elisei, RFC v4 and v5, 2021 (kvm.md P2c, error E2); J. Morse's memslot flag, which fails where the VMA
    does not suit (P2b), has raise_memlock=false and refuse_numa_balancing=true; VFIO, whose tables follow no
    notifier (P2d), has follow_notifiers=false. W. Deacon: "pinning all of guest memory is really crap".
    Needs: a memlock limit as large as the VM, or CAP_IPC_LOCK; a kernel without NUMA balancing (v5's Kconfig).
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
    follow_notifiers: bool = field(
        default=True,
        metadata=doc(
            "stage 2 follows MMU notifiers; false: like VFIO's IOMMU tables it changes by explicit unmapping only",
            source="kvm.md P2d",
        ),
    )
    refuse_numa_balancing: bool = field(
        default=False,
        metadata=doc("cannot be built with CONFIG_NUMA_BALANCING, as v5's Kconfig says", source="P:c1ed501e"),
    )

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        if self.refuse_numa_balancing and platform.numa_balancing:
            return "the host balances NUMA nodes, and KVM_ARM_SPE depends on !NUMA_BALANCING (host has numa_scan)"
        return None

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return Notifier(0) if self.follow_notifiers else ~Notifier(0)

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        vms.pin_all(ignore_limit=self.raise_memlock)

    @hookimpl
    def migration_finished(self, vms: Vms) -> None:
        vms.unpin_all()  # where the migration was given up the pins are still there
        vms.pin_all(ignore_limit=self.raise_memlock)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.HOST)
        faults.inject(Event.EXTERNAL_ABORT)
