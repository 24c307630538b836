"""Will Deacon, 2025: if a VM is special, let the guest say what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Platform, Trap, hookimpl
from spepolicy.machine.hostops import Notifier

from .pinning import CLAIMS_DOC, NOTIFIERS, NOTIFIERS_DOC, TABLES_DOC, claim, pin_range


@dataclass
class Paravirtual:
    """The guest's driver announces each AUX ring by a hypercall, and KVM pins it until the next one.

    Mechanism: (1) when perf maps an AUX ring the driver calls KVM with its range. (2) KVM unpins the ring before, walks
    stage 1, pins and maps the ring and its tables. (3) Enabling and disabling the buffer cost nothing more: KVM traps
    PMB* for PMBIRQ only. (4) A later stage 2 fault with DL=0 pins it anew. (5) What is announced migrates with the VM
    as other paravirtual state does: the target pins it before the guest runs, and so does the source where KVM had
    dropped its pins and the migration was given up (kvm.md M9). Allocation through an interface that KVM knows of
    (virtio-iommu or the DMA API, kvm.md P10) has the same shape: pinned when allocated, unpinned when freed.
    Source: W. Deacon, 8 Sep 2025 (kvm.md P11); Leo Yan, 15 Dec 2025 (P10, a question only).
    Needs: a guest driver that calls; a software walk of stage 1; a notifier change.
    Costs: a hypercall, a walk and pins per AUX ring, not per enable; the ring is locked while perf has it.
    Fails: guests that do not call are not served; a guest may announce more than the limit allows, and is told when it
    enables the buffer.
    """

    pin_stage1_tables: bool = field(default=True, metadata=TABLES_DOC)
    notifiers: str = field(default="finer", metadata=NOTIFIERS_DOC)
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        if not platform.paravirtual_guest:
            return "the guest's SPE driver announces no buffer (guest.paravirtual=false)"
        return None

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return NOTIFIERS[self.notifiers]

    @hookimpl
    def buffer_announced(self, vcpus: Vcpus) -> None:
        vcpus.unpin()  # the ring before is gone, and a limit that holds one ring need not hold two
        walk = vcpus.walk_stage1(vcpus.announced_lo, vcpus.announced_hi, pin_tables=self.pin_stage1_tables)
        walk.ok.pin().ok.unpin_previous()

    @hookimpl
    def migration_finished(self, vcpus: Vcpus) -> None:
        self.buffer_announced(vcpus.where(vcpus.pinned_pages == 0))

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        held = (vcpus.pinned_pages > 0) & (vcpus.buffer_lo >= vcpus.pinned_lo) & (vcpus.buffer_hi <= vcpus.pinned_hi)
        vcpus.where(~held).inject(Event.IMPDEF, data_loss=True)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        claim(faults, self.claims, Cause.HOST)
        repaired = faults.where(~faults.data_loss)
        pin_range(repaired, repaired.announced_lo, repaired.announced_hi, tables=self.pin_stage1_tables).resume()
        faults.where(faults.data_loss).inject(Event.IMPDEF, data_loss=True)
