"""Parts that several pinning policies share: pinning a range and telling the guest where that fails, saying whose doing
a fault is, and which notifier events to ignore.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spepolicy.arch.registers import PMBLIMITR_E, PMBSR_S
from spepolicy.batch import PinResult, Vcpus, WalkedVcpus
from spepolicy.hookspecs import Cause, Event, doc
from spepolicy.machine.hostops import Notifier

NOTIFIERS = {
    "honour": Notifier(0),
    "all_but_unmap": ~Notifier.UNMAP,
    "harmless": Notifier.HARMLESS,
    "finer": Notifier.PROTECTION_VMA | Notifier.PROTECTION_PAGE | Notifier.SOFT_DIRTY,
}
NOTIFIERS_DOC: dict[str, Any] = doc(
    "MMU notifier events on pinned pages: 'honour' them as mainline does; ignore 'all_but_unmap'; 'finer': ignore "
    "those that leave the page in place (protection changes and soft-dirty) and honour CLEAR and UNMAP; 'harmless': "
    "ignore all that leaves a pinned page alone, if the kernel told KVM the caller",
    choices=tuple(NOTIFIERS),
    source="A. Elisei, 12 Aug 2022; RFC v6 patches 30 and 31 (kvm.md H8)",
)
CLAIMS_DOC: dict[str, Any] = doc(
    "how KVM explains a fault: 'assume' what the design says, or 'look' at stage 2, the list of pinned pages and the "
    "notes of the notifier handler, at the cost of a walk",
    choices=("assume", "look"),
    source="A. Elisei, 9 Aug and 12 Sep 2022 (kvm.md 4.5)",
)
TABLES_DOC: dict[str, Any] = doc(
    "also pin the guest's stage 1 tables on the way to the buffer", source="kvm.md G4: O. Upton for, M. Zyngier against"
)


def pin_range(
    vcpus: Vcpus, lo: ArrayLike, hi: ArrayLike, *, tables: bool, one_range: bool = False, grow: bool = False
) -> Vcpus:
    """Walk and pin [lo, hi) of each vCPU, then drop its pins from before, or with *grow* keep them.

    Where that fails the guest is told: a stage 1 abort if it has not mapped the range, an IMPLEMENTATION DEFINED event
    if the memlock limit or a missing page forbids. Return the vCPUs where it worked.
    """
    walk = vcpus.walk_stage1(lo, hi, pin_tables=tables, one_range=one_range)
    walk.failed.inject(Event.STAGE1_ABORT)
    return pin_listed(walk.ok, grow=grow)


def pin_listed(walked: WalkedVcpus, *, grow: bool = False) -> Vcpus:
    """Pin what a walk has found, then drop the pins from before, or with *grow* keep them; tell the guest where that
    fails. Return the vCPUs where it worked.
    """
    pinned = walked.pin()
    pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
    return keep(pinned, grow=grow)


def keep(pinned: PinResult, *, grow: bool = False) -> Vcpus:
    """Go on with what was *pinned* as `pin_listed` does; what exceeded the memlock limit is the caller's business."""
    pinned.no_page.inject(Event.IMPDEF, data_loss=True)
    if grow:
        pinned.ok.keep_previous()
    else:
        pinned.ok.unpin_previous()
    return pinned.ok


def pin_buffer(vcpus: Vcpus, tables: bool) -> Vcpus:
    """Pin [PMBPTR, LIMIT) as `pin_range` does."""
    return pin_range(vcpus, vcpus.buffer_lo, vcpus.buffer_hi, tables=tables)


def still_enabled(vcpus: Vcpus) -> Vcpus:
    """After a migration, return the vCPUs whose buffer is enabled: KVM_SET_ONE_REG on the target is a write to the
    registers like the guest's own. Where the migration was given up their pins are still there: what is pinned anew
    must be unpinned first, or it counts twice.
    """
    return vcpus.where((vcpus.pmblimitr & PMBLIMITR_E != 0) & (vcpus.pmbsr & PMBSR_S == 0))


def claim(faults: Vcpus, how: str, assumed: Cause) -> None:
    """Claim *assumed* for every fault, or with *how* = "look" what the evidence speaks for.

    A page that KVM has in its list and that no notifier took must be mapped: if it is not, that is KVM's own bug. One
    that a notifier took is the host's doing. One that is not in the list although its address is in the range that was
    pinned has another IPA than it had then: the guest changed its translations.
    """
    if how == "assume" or not len(faults):
        faults.claim(assumed)
        return
    seen = faults.look()
    causes = np.full(len(faults), int(Cause.HOST), dtype=np.int64)  # mapped again, or taken by a notifier
    unexplained = seen.missing & ~seen.notified
    causes[unexplained & seen.listed] = Cause.KVM_BUG
    causes[unexplained & ~seen.listed] = Cause.NOT_PINNED
    causes[unexplained & ~seen.listed & seen.in_range & ~seen.table] = Cause.GUEST
    faults.claim(causes)
