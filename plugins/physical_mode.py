"""FEAT_SPE_nVM: let the guest give its SPU physical addresses, so that there is no stage 1 to walk or to pin."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Platform, Trap, doc, hookimpl
from spepolicy.machine.hostops import Notifier

from .pinning import CLAIMS_DOC, NOTIFIERS, NOTIFIERS_DOC, TABLES_DOC, claim, pin_buffer, pin_listed, still_enabled


@dataclass
class PhysicalMode:
    """Offer PMBLIMITR_EL1.nVM to the guest: its buffer is a range of IPAs, which KVM pins without walking stage 1.

    Mechanism: (1) KVM sets PMSCR_EL2.EnVM, PMBIDR_EL1.AddrMode then reads 1. (2) A driver that knows allocates a
    contiguous ring and gives the SPU its physical address; stage 1 is off for the SPU, stage 2 applies. (3) When the
    guest enables its buffer KVM pins and maps [PMBPTR, LIMIT): no walk, and no table to keep. (4) unpin=at_next keeps
    the pages until the guest names others: no translation of the guest can have changed behind KVM's back, which is
    what a cache of pins cannot know otherwise. at_disable unpins when the buffer is disabled. (5) A stage 2 fault with
    DL=0 pins what is left of the buffer anew. (6) What a driver without nVM enables is walked, with its tables.
    Source: kvm.md P13: RFC v6 leaves PMSCR_EL2.EnVM at 0 and PMBLIMITR_EL1.nVM RES0; spe.md rules 50 and 51.
    Needs: FEAT_SPE_nVM, which is optional before SPEv1p5; a guest driver that uses it, and none is known; contiguous
    memory in the guest; a notifier change.
    Costs: traps of PMB*, PMBMAR_EL1 among them; pins and maps of a range once; a locked ring with at_next.
    Fails: a guest that cannot allocate so much contiguous memory has to do with a smaller buffer; one that moves its
    pages while the buffer is enabled is not followed: the SPU writes to the old ones. With at_next, a ring beside the
    one that the guest gave up looks like its next part: both stay pinned, and so on until the memlock limit.
    """

    unpin: str = field(
        default="at_next",
        metadata=doc("when pages are unpinned: 'at_next' buffer elsewhere, or 'at_disable' of this one",
                     choices=("at_next", "at_disable"), source="kvm.md 2.2: P4, P8, P9a"),
    )  # fmt: skip
    pin_stage1_tables: bool = field(default=True, metadata=TABLES_DOC)
    notifiers: str = field(default="finer", metadata=NOTIFIERS_DOC)
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        if not platform.physical_addressing:
            return "the SPU has no FEAT_SPE_nVM (cpu.features=[nVM], or cpu.spe_version=6)"
        return None

    @hookimpl
    def physical_addressing(self) -> bool:
        return True

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return NOTIFIERS[self.notifiers]

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        self._pin(vcpus)

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        vcpus.where(~vcpus.physical | (self.unpin == "at_disable")).unpin()

    @hookimpl
    def migration_finished(self, vcpus: Vcpus) -> None:
        again = still_enabled(vcpus)
        again.where(~again.physical).unpin()  # a range that is held needs no second pin
        self._pin(again)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        claim(faults, self.claims, Cause.HOST)
        faults.where(faults.data_loss).inject(Event.IMPDEF, data_loss=True)
        whole = faults.where(~faults.data_loss)
        named = whole.where(whole.physical)
        _pin_range(named, named.buffer_lo, named.buffer_hi).resume()
        pin_buffer(whole.where(~whole.physical), self.pin_stage1_tables).resume()

    def _pin(self, vcpus: Vcpus) -> None:
        pin_buffer(vcpus.where(~vcpus.physical), self.pin_stage1_tables)
        named = vcpus.where(vcpus.physical)
        lo, hi = named.buffer_lo, named.buffer_hi
        begin, end = named.pinned_lo, named.pinned_hi
        held = named.pinned_pages > 0
        within = held & (lo >= begin) & (hi <= end)
        after = held & (lo >= begin) & (lo <= end) & (hi > end)  # the ring's next part: only what is new of it
        anew = named.where(~within & ~after)
        _pin_range(anew, anew.buffer_lo, anew.buffer_hi)
        grown = named.where(after)
        _pin_range(grown, grown.pinned_hi, grown.buffer_hi, grow=True)


def _pin_range(vcpus: Vcpus, lo: np.ndarray, hi: np.ndarray, *, grow: bool = False) -> Vcpus:
    """Pin the IPAs [lo, hi) of each vCPU as `pinning.pin_range` does with VAs."""
    listed = vcpus.list_physical(lo, hi)
    listed.failed.inject(Event.IMPDEF, data_loss=True)
    return pin_listed(listed.ok, grow=grow)
