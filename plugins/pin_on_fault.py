"""Approach 4 of 2022: pin at the first stage 2 fault; how much, and what a later fault means, are its variants."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl

from .pinning import CLAIMS_DOC, TABLES_DOC, claim, pin_buffer, pin_range

PAGE = np.uint64(0x1000)


def pin_buffer_and_resume(faults: Vcpus, pin_stage1_tables: bool) -> None:
    """Walk and pin [PMBPTR, LIMIT), unpin the buffer before, and let the SPU go on; tell the guest where that fails."""
    pin_buffer(faults, pin_stage1_tables).resume()


@dataclass
class PinOnFault:
    """Do nothing until the SPU faults at stage 2; then pin what is left of the buffer and go on.

    Mechanism: (1) the first record that hits an unmapped page stops the SPU. (2) On the exit KVM walks stage 1 from
    PMBPTR on, pins and maps those pages, and unpins those of the previous fault. (3) PMBSR.S is cleared, the SPU goes
    on. extent says how far: the whole buffer; one walk, that is the page and the tables to reach it; or one range of
    contiguous IPA. A fault with DL=1 is an error unless nothing was recorded before, which KVM cannot know: it tells
    the guest. later_faults says what a fault in what is pinned already means.
    Source: kvm.md P5; 5b one root-to-target walk, O. Upton 26 Jul 2022; 5b' one IPA range, M. Zyngier 27 Jul 2022; 5c
    non-destructive handler, O. Upton 17 Aug 2022, against A. Elisei 12 Sep 2022 (fail).
    Needs: a software walk of stage 1; nothing of PMS* traps.
    Costs: one gap and one exit per fault; pins only guests that profile; one trap per PMB* access.
    Fails: a legitimate first fault cannot be told from a bug in KVM (A. Elisei, 9 Aug 2022); with extent=walk a gap per
    page; with extent=ipa_range nearly so, for Linux's AUX pages are scattered.
    """

    pin_stage1_tables: bool = field(default=True, metadata=TABLES_DOC)
    extent: str = field(
        default="buffer",
        metadata=doc(
            "what a fault pins: the whole 'buffer', one 'walk', or one 'ipa_range'",
            choices=("buffer", "walk", "ipa_range"),
            source="kvm.md P5, P5b, P5b'",
        ),
    )
    later_faults: str = field(
        default="repin",
        metadata=doc(
            "a fault with DL=0 at an address that is pinned: 'repin' (non-destructive), or 'fail' the session",
            choices=("repin", "fail"),
            source="kvm.md P5c",
        ),
    )
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        claim(faults, self.claims, Cause.NOT_PINNED)
        fatal = faults.data_loss
        if self.later_faults == "fail":
            held = faults.pinned_pages > 0
            known = held & (faults.pmbptr >= faults.pinned_lo) & (faults.pmbptr < faults.pinned_hi)
            fatal = fatal | known
        faults.where(fatal).inject(Event.IMPDEF, data_loss=True)
        repaired = faults.where(~fatal)
        lo, hi = repaired.buffer_lo, repaired.buffer_hi
        if self.extent == "walk":
            hi = np.minimum(hi, lo + PAGE)
        one_range = self.extent == "ipa_range"
        pin_range(repaired, lo, hi, tables=self.pin_stage1_tables, one_range=one_range).resume()
