"""RFC v7: memory that the host cannot move, all of it mapped before the first vCPU runs."""

from __future__ import annotations

from dataclasses import dataclass

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Platform, Trap, hookimpl


@dataclass
class GuestMemfd:
    """Back the VM by a guest_memfd and map all of it with KVM_PRE_FAULT_MEMORY before the first vCPU runs.

    Mechanism: (1) RAM slots are backed by a guest_memfd, whose folios are neither movable nor evictable. (2) The VMM
    calls KVM_PRE_FAULT_MEMORY over all RAM. (3) KVM follows no MMU notifier for such a slot, so that NUMA balancing,
    KSM, THP and even munmap() by the VMM leave stage 2 alone. (4) Registers are switched, PMB* traps for PMBIRQ.
    Source: A. Elisei, RFC v7, 3 Sep 2026 (kvm.md P2e, H15).
    Needs: guest_memfd that the VMM can map, and its three prerequisite series; no walker, no FGT.
    Costs: the VM's memory cannot be swapped, merged, moved between nodes or overcommitted, whether it profiles or not;
    stage 2 is built before boot; one trap per PMB* access.
    Fails: a hole punch (balloon) and KVM's own dirty log still unmap or write-protect; such a fault is an error that is
    told to the guest. Prefaulting promises that a page was mapped once, not that it still is.
    """

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        if not platform.guest_memfd:
            return "the host's kernel cannot back a VM by a guest_memfd (kvm.guest_memfd=false)"
        return None

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        vms.use_guest_memfd()
        vms.map_all()

    @hookimpl
    def migration_finished(self, vms: Vms) -> None:
        vms.map_all()  # the target's VMM prefaults too

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.HOST)
        faults.inject(Event.IMPDEF, data_loss=True)
