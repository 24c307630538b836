"""Approach 2 of 2022: pin nothing, map the page that faulted."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spepolicy.batch import Vcpus
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl


@dataclass
class MapOnFault:
    """Handle each stage 2 fault like an ordinary one: walk the guest's stage 1, map the page, go on.

    Mechanism: (1) the SPU stops, PMBIRQ makes the vCPU exit. (2) PMBPTR is a VA, so KVM walks the guest's tables in
    software. (3) The page is faulted in and mapped, not pinned. (4) KVM clears PMBSR.S and the SPU goes on at the same
    PMBPTR.
    Source: kvm.md P3, A. Elisei 2 Aug 2022, and P3b, M. Zyngier 27 Jul 2022 ("what breaks with no pinning at all?").
    Needs: a software walk of stage 1, run in the context of the vCPU that owns the SPU.
    Costs: an exit, a walk and a map per fault; no locked memory; one trap per PMB* access.
    Fails: one gap per page that is not mapped; with DL=1 a record was cut and what is in the buffer cannot be trusted,
    and resuming hides that from the guest.
    """

    after_data_loss: str = field(
        default="resume",
        metadata=doc(
            "a fault with DL=1: 'resume' as if nothing had been lost, or 'tell' the guest",
            choices=("resume", "tell"),
            source="P:af86676b",
        ),
    )

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.NOT_PINNED)
        told = faults.data_loss & (self.after_data_loss == "tell")
        faults.where(told).inject(Event.IMPDEF, data_loss=True)
        repaired = faults.where(~told)
        page = repaired.buffer_lo
        # Tables too: the SPU's walk itself may have faulted.
        walk = repaired.walk_stage1(page, page + np.uint64(0x1000), pin_tables=True)
        walk.failed.inject(Event.STAGE1_ABORT)
        mapped = walk.ok.map()
        walk.ok.where(mapped).resume()
        walk.ok.where(~mapped).inject(Event.IMPDEF, data_loss=True)
