"""Approach 2 of 2022: pin nothing, map the page that faulted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spepolicy.batch import Vcpus
from spepolicy.hookspecs import Cause, Event, Trap, hookimpl


@dataclass
class MapOnFault:
    """Handle each stage 2 fault like an ordinary one: walk the guest's stage 1, map the page, go on.

    Mechanism: (1) the SPU stops, PMBIRQ makes the vCPU exit. (2) PMBPTR is a VA, so KVM walks the guest's tables in
    software. (3) The page is faulted in and mapped, not pinned. (4) KVM clears PMBSR.S and the SPU goes on at the same
    PMBPTR.
    Source: kvm.md P3, A. Elisei 2 Aug 2022, and P3b, M. Zyngier 27 Jul 2022 ("what breaks with no pinning at all?").
    Costs: an exit, a walk and a map per fault; no locked memory; one trap per PMB* access.
    Fails: one gap per page that is not mapped; with DL=1 a record was cut and what is in the buffer cannot be trusted,
    and resuming hides that from the guest.
    """

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.NOT_PINNED)
        page = faults.buffer_lo
        walk = faults.walk_stage1(
            page, page + np.uint64(0x1000), pin_tables=True
        )  # tables too: the walk itself may have faulted
        walk.failed.inject(Event.STAGE1_ABORT)
        mapped = walk.ok.map()
        walk.ok.where(mapped).resume()
        walk.ok.where(~mapped).inject(Event.IMPDEF, data_loss=True)
