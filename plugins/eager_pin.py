"""Approach 3 of 2022: pin the buffer when profiling becomes enabled, with the treatments of EL0-only sessions."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.arch.registers import PMBLIMITR_E, PMSCR_E1SPE
from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Cause, Event, Platform, Trap, doc, hookimpl
from spepolicy.machine.hostops import Notifier

from .pinning import CLAIMS_DOC, TABLES_DOC, claim, pin_buffer, still_enabled

TREATMENTS = ("error", "documentation", "first_fault", "eret_once", "eret_always", "e0spe", "erratum")


@dataclass
class EagerPin:
    """Pin the guest's buffer when profiling becomes enabled; unpin it when the next one is pinned.

    Mechanism: (1) PMB* and PMS* trap. (2) When a write makes the buffer and E1SPE enabled, KVM walks stage 1 from
    PMBPTR to PMBLIMITR.LIMIT, pins those pages and maps them. (3) Only then the previous buffer's pages are unpinned,
    for a drain may still write to them when profiling is switched off. (4) A later stage 2 fault means that the
    emulation does not work: IMPLEMENTATION DEFINED event with DL. {E0SPE,E1SPE} = {1,0} becomes enabled by an ERET:
    el0_only says what is done about it.
    Source: kvm.md P4 and 4a to 4e; W. Deacon 19 Apr 2022, M. Rutland's case of 25 Jul 2022, A. Elisei 2 Aug to 13 Sep
    2022. keep_mapped is his of 12 Aug 2022.
    Needs: a software walk of stage 1; a notifier change for keep_mapped; FEAT_FGT for eret_once and eret_always.
    Costs: a trap per register access; a walk, a pin and a map per page at each enabling write; locked memory; with
    eret_always a trap per return to EL0 for as long as the buffer is enabled.
    Fails: {1,0} unless it is treated; notifiers unmap pinned pages; memlock.
    """

    pin_stage1_tables: bool = field(default=False, metadata=TABLES_DOC)
    keep_mapped: bool = field(
        default=False,
        metadata=doc("ignore every MMU notifier event but UNMAP for pinned pages: fewer faults, silent divergence"),
    )
    el0_only: str = field(
        default="error",
        metadata=doc(
            "{E0SPE,E1SPE} = {1,0}: 'error' (nothing is pinned, the first fault is an error); 'documentation' "
            "(pinned at the write that leaves {1,0}; guests are told not to change translations from then on); "
            "'first_fault' (pin then); 'eret_once' and 'eret_always' (trap the ERET, the first one or every one, and "
            "pin there); 'e0spe' (pinned at that write, and again at a fault); 'erratum' (as documentation, a fault "
            "is answered like an SError)",
            choices=TREATMENTS,
            source="kvm.md P4a to P4e",
        ),
    )
    claims: str = field(default="assume", metadata=CLAIMS_DOC)

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        if self.el0_only.startswith("eret") and not platform.fine_grained_traps:
            return f"el0_only={self.el0_only} traps ERET, which needs FEAT_FGT (cpu.fine_grained_traps=false)"
        return None

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB | Trap.PMS

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return ~Notifier.UNMAP if self.keep_mapped else Notifier(0)

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        pin_buffer(vcpus, self.pin_stage1_tables)

    @hookimpl
    def user_profiling_armed(self, vcpus: Vcpus) -> None:
        if self.el0_only in ("documentation", "e0spe", "erratum"):
            pin_buffer(vcpus, self.pin_stage1_tables)
        elif self.el0_only.startswith("eret"):
            vcpus.trap_eret(True)

    @hookimpl
    def eret(self, vcpus: Vcpus) -> None:
        if self.el0_only == "eret_once":
            vcpus.trap_eret(False)
        enabled = vcpus.pmblimitr & PMBLIMITR_E != 0
        vcpus.where(~enabled).trap_eret(False)
        pin_buffer(vcpus.where(enabled), self.pin_stage1_tables)

    @hookimpl
    def migration_finished(self, vcpus: Vcpus) -> None:
        again = still_enabled(vcpus.where(vcpus.pmscr & PMSCR_E1SPE != 0))
        again.unpin()
        pin_buffer(again, self.pin_stage1_tables)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        vms.unpin_all()

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        user_only = (faults.pmscr & 0b11) == 0b01
        again = user_only & (self.el0_only in ("first_fault", "e0spe"))
        late = faults.where(again)
        claim(late, self.claims, Cause.NOT_PINNED)
        pin_buffer(late, self.pin_stage1_tables).resume()
        broken = user_only & (self.el0_only in ("documentation", "erratum"))
        rule_breaker = faults.where(broken)
        claim(rule_breaker, self.claims, Cause.GUEST)
        if self.el0_only == "erratum":
            rule_breaker.inject(Event.EXTERNAL_ABORT, data_loss=True)
        else:
            rule_breaker.inject(Event.IMPDEF, data_loss=True)
        rest = faults.where(~again & ~broken)
        claim(rest, self.claims, Cause.HOST)
        rest.inject(Event.IMPDEF, data_loss=True)
