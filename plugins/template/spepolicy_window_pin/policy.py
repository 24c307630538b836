"""Pin a window of the guest's buffer that moves along with PMBPTR_EL1."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Trap, doc, hookimpl

PAGE = np.uint64(4096)


@dataclass
class WindowPin:
    """Pin the next pages of the buffer only, and the next window when the SPU faults behind them.

    Mechanism: (1) PMB* and PMS* trap. (2) A write that enables profiling pins `window_pages` from PMBPTR on, with the
    stage 1 tables on the way. (3) At a stage 2 fault KVM pins the window behind PMBPTR, unpins the one before, and lets
    the SPU go on. (4) A fault that cut a record is told to the guest.
    Source: this template; it lies between P4 and P5 of the project's notes on the discussion.
    Needs: trapping registers and a software walk of stage 1, as every policy that pins does.
    Costs: a walk and a pin per page of a window, a gap and an exit per window.
    Fails: where MMU notifiers unmap pinned pages; where the memlock limit is below a window and its tables.
    """

    window_pages: int = field(
        default=16, metadata=doc("pages that are pinned ahead", unit="pages", minimum=1, maximum=16384)
    )

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        self._pin_window(vcpus)

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.NOT_PINNED)
        cut = faults.data_loss
        faults.where(cut).inject(Event.IMPDEF, data_loss=True)
        self._pin_window(faults.where(~cut)).resume()

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    def _pin_window(self, vcpus: Vcpus) -> Vcpus:
        """Pin the window behind PMBPTR in place of the one before; return the vCPUs where that worked."""
        end = np.minimum(vcpus.buffer_lo + np.uint64(self.window_pages) * PAGE, vcpus.buffer_hi)
        walk = vcpus.walk_stage1(vcpus.buffer_lo, end, pin_tables=True)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
        pinned.no_page.inject(Event.IMPDEF, data_loss=True)
        pinned.ok.unpin_previous()
        return pinned.ok
