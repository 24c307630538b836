"""RFC v6: buffer and stage 1 tables are pinned for as long as the buffer is enabled."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Platform, Trap, doc, hookimpl
from spepolicy.machine.hostops import Notifier

from .pinning import CLAIMS_DOC, NOTIFIERS, NOTIFIERS_DOC, TABLES_DOC, claim, keep, still_enabled


@dataclass
class PinWhileEnabled:
    """Pin the buffer and its stage 1 tables when the buffer is enabled, unpin both when it is disabled.

    Mechanism: (1) PMB* trap. (2) At a write that makes ProfilingBufferEnabled() true KVM walks stage 1 over the buffer
    with a callback that pins the table pages too, pins and maps the buffer. (3) A missing stage 1 entry is told as a
    stage 1 abort. (4) Notifier events are filtered, so that pinned pages stay mapped. (5) At PMBLIMITR_EL1.E=0, after
    the guest's drain, everything is unpinned. (6) The buffer's size is capped (PMBIDR_EL1.MaxBuffSize); a larger one is
    told BSC 4. (7) Over RLIMIT_MEMLOCK the guest is told, or KVM_EXIT_RLIMIT goes to the VMM, which raises the limit.
    Source: A. Elisei, RFC v6, 14 Nov 2025 (kvm.md P8); errors in patches 29 and 32 to 33; cap in patch 14.
    Needs: a software walk of stage 1, a notifier change, FEAT_FGT to trap PMBIDR_EL1 where the guest is to see the cap
    (show_limit); VHE.
    Costs: a walk, pins and maps of the whole buffer at each enable and the reverse at each disable: per-thread perf
    does that at every context switch (J. Clark, 9 Jan 2026); locked memory while enabled.
    Fails: a guest that changes translations while E=1; what the filter ignores although the page went (divergence).
    """

    pin_stage1_tables: bool = field(default=True, metadata=TABLES_DOC)
    notifiers: str = field(default="finer", metadata=NOTIFIERS_DOC)
    max_buffer_KiB: int = field(
        default=4096,
        metadata=doc("largest buffer that is served, 0: no limit", unit="KiB", minimum=0, maximum=1 << 20,
                     source="kvmtool's default for v6 (kvm.md 3.2)"),
    )  # fmt: skip
    show_limit: bool = field(
        default=False, metadata=doc("the guest reads the limit from PMBIDR_EL1.MaxBuffSize, which KVM has to trap")
    )
    over_limit: str = field(
        default="tell",
        metadata=doc("over RLIMIT_MEMLOCK: 'tell' the guest, or 'vmm_raises' the limit after KVM_EXIT_RLIMIT",
                     choices=("tell", "vmm_raises"), source="kvm.md E9: raise and retry is an inference"),
    )  # fmt: skip
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        if self.show_limit and not platform.fine_grained_traps:
            return "show_limit traps PMBIDR_EL1, which needs FEAT_FGT (cpu.fine_grained_traps=false)"
        return None

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return NOTIFIERS[self.notifiers]

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        size = vcpus.buffer_hi - vcpus.buffer_lo
        too_large = (size > np.uint64(self.max_buffer_KiB << 10)) & (self.max_buffer_KiB != 0)
        vcpus.where(too_large).inject(Event.TOO_LARGE)
        served = vcpus.where(~too_large)
        walk = served.walk_stage1(served.buffer_lo, served.buffer_hi, pin_tables=self.pin_stage1_tables)
        walk.failed.inject(Event.STAGE1_ABORT)
        pinned = walk.ok.pin()
        keep(pinned)
        if self.over_limit == "tell":
            pinned.over_limit.inject(Event.IMPDEF, data_loss=True)
            return
        pinned.over_limit.exit_to_vmm()
        again = pinned.over_limit.walk_stage1(
            pinned.over_limit.buffer_lo, pinned.over_limit.buffer_hi, pin_tables=self.pin_stage1_tables
        )
        keep(again.ok.pin(ignore_limit=True))

    @hookimpl
    def migration_finished(self, vcpus: Vcpus) -> None:
        again = still_enabled(vcpus)
        again.unpin()
        self.buffer_enabled(again)

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        vcpus.unpin()

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        claim(faults, self.claims, Cause.HOST)
        faults.inject(Event.IMPDEF, data_loss=True)
