"""Will Deacon's first answer: pin what can be pinned, carry on if it cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spepolicy.arch.registers import PMSCR_E1SPE
from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, hookimpl

from .pinning import CLAIMS_DOC, TABLES_DOC, claim, still_enabled


@dataclass
class BestEffortPin:
    """Pin when profiling is enabled if the limit allows, go on in any case, and fail the session at a fault.

    Mechanism: (1) PMB* and PMS* trap. (2) At the write that enables profiling at EL1 KVM walks and pins the buffer
    within RLIMIT_MEMLOCK. (3) If it cannot, the guest runs on without pins: the device is marked, nothing is told.
    (4) A stage 2 fault is told as an error with DL, so that the perf session fails and the VM does not. (5) On the
    target of a migration (2) is done for what is enabled, before the guest runs: KVM_SET_ONE_REG is a write, too.
    Source: W. Deacon, 19 Apr 2022 (kvm.md P3c); "keeps the pieces".
    Needs: a software walk of stage 1.
    Costs: as eager_pin, bounded by the limit.
    Fails: unpinned sessions end at the first fault; with {E0SPE,E1SPE} = {1,0} nothing is ever pinned.
    """

    pin_stage1_tables: bool = field(default=False, metadata=TABLES_DOC)
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    State = np.dtype([("unpinned", "u1")])  # 1: the last attempt failed, the session runs at the guest's risk

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        walk = vcpus.walk_stage1(vcpus.buffer_lo, vcpus.buffer_hi, pin_tables=self.pin_stage1_tables)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        pinned.ok.unpin_previous()
        for batch, mark in ((pinned.ok, 0), (pinned.over_limit, 1), (pinned.no_page, 1)):
            batch.state["unpinned"] = mark

    @hookimpl
    def migration_finished(self, vcpus: Vcpus) -> None:
        again = still_enabled(vcpus.where(vcpus.pmscr & PMSCR_E1SPE != 0))
        again.unpin()
        self.profiling_enabled(again)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        unpinned = faults.state["unpinned"] != 0
        claim(faults.where(~unpinned), self.claims, Cause.HOST)
        faults.where(unpinned).claim(Cause.NOT_PINNED)
        faults.inject(Event.IMPDEF, data_loss=True)
