"""November 2022: the SPU writes to a buffer of KVM's, and KVM copies."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import CopyResult, Vcpus
from spepolicy.hookspecs import Cause, Event, Ownership, Platform, Trap, doc, hookimpl
from spepolicy.judge.errata import Erratum


@dataclass
class CopyBuffer:
    """Own the profiling buffer, let the SPU write to host memory, and copy the records to the guest's buffer.

    Mechanism: (1) MDCR_EL2.E2PB=0b00: EL2 owns the buffer, accesses to PMB* trap and reach KVM's shadows. (2) When the
    guest enables its buffer KVM programs its own. (3) When that is full, or the guest disables its buffer, KVM stops
    and drains, walks the guest's stage 1, copies through the VMM's mapping, and moves PMBPTR_EL1 as the guest reads it
    along. (4) Once the guest's buffer is full KVM raises that event. copy says how: 'all' at the stop, from a buffer as
    large as the guest's; 'lazy', the guest's pages are taken away at stage 2 and copied when they are read;
    'chunked', a small buffer, copied whenever it is full; 'collision', the same, and the guest is told of the records
    that were missed meanwhile by PMBSR_EL1.COLL. With tell_vmm the VMM learns that the guest's buffer is the larger
    one: it may give KVM another limit, or leave it.
    Source: A. Elisei, "A new approach for SPE support", 23 Nov 2022 (kvm.md P7, 7a, 7b, 7d, 7f), M. Rutland, 4 Jan
    2023 (7e, 7g).
    Needs: a software walk of stage 1; FEAT_FGT for hide_ownership; no pins, no notifier change.
    Costs: a copy of every byte; host memory a vCPU; every access to PMB* traps; with 'chunked' and 'collision' a gap
    per chunk.
    Fails: PMBIDR_EL1.P reads 1 while profiling unless it is trapped; a guest that reads PMBPTR_EL1 without stopping
    sees it stand still (7c); records are lost where the guest has unmapped its buffer by the time they are copied.
    """

    copy: str = field(
        default="all",
        metadata=doc("when and how records are copied", choices=("all", "lazy", "chunked", "collision"),
                     source="kvm.md P7a, P7b, P7d, P7e"),
    )  # fmt: skip
    buffer_KiB: int = field(
        default=64,
        metadata=doc("KVM's own buffer a vCPU, with copy=chunked and copy=collision", unit="KiB", minimum=8,
                     maximum=65536),
    )  # fmt: skip
    tell_vmm: bool = field(
        default=False,
        metadata=doc("exit to the VMM whenever the guest's buffer turns out to be larger than KVM's",
                     source="kvm.md P7f"),
    )  # fmt: skip
    hide_ownership: bool = field(
        default=False, metadata=doc("trap PMBIDR_EL1 so that P reads 0", source="kvm.md P7g, G11")
    )

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        if self.hide_ownership and not platform.fine_grained_traps:
            return "hide_ownership traps PMBIDR_EL1, which needs FEAT_FGT (cpu.fine_grained_traps=false)"
        return None

    @hookimpl
    def ownership(self) -> Ownership:
        return Ownership.KVM

    @hookimpl
    def traps(self) -> Trap:
        return Trap.PMB

    @property
    def _pages(self) -> int:
        return self.buffer_KiB // 4 if self.copy in ("chunked", "collision") else 65536

    def _copy(self, vcpus: Vcpus) -> CopyResult:
        done = vcpus.defer_copy() if self.copy == "lazy" else vcpus.copy_out()
        done.unmapped.inject(Event.STAGE1_ABORT, data_loss=True)
        done.no_page.inject(Event.IMPDEF, data_loss=True)
        return done

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        vcpus.start_own_buffer(self._pages)

    @hookimpl
    def own_buffer_full(self, vcpus: Vcpus) -> None:
        done = self._copy(vcpus)
        done.full.inject(Event.BUFFER_FULL)
        if self.copy == "collision":
            done.room.report_collision()
        if self.tell_vmm:
            done.room.exit_to_vmm()
        done.room.start_own_buffer(self._pages)

    @hookimpl
    def buffer_stopping(self, vcpus: Vcpus) -> None:
        self._copy(vcpus)

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.claim(Cause.KVM_BUG)  # the SPU does not use stage 2: it cannot happen
        faults.inject(Event.IMPDEF, data_loss=True)

    @hookimpl
    def errata(self) -> list[Erratum]:
        if self.hide_ownership:
            return []
        return [
            Erratum(
                id="SPE-KVM-20",
                title="PMBIDR_EL1.P reads 1 while the guest profiles",
                trigger="The guest reads PMBIDR_EL1 while its buffer is enabled, and KVM owns the buffer (E2PB=0b00).",
                versions="all without FEAT_FGT; with it KVM can trap the register",
                effect_on_guest="P=1 says that a higher exception level owns the buffer. Linux reads it at probe time "
                "only, when KVM has not taken ownership; a driver that checks again may give up.",
                effect_on_profile="None with Linux.",
                severity="low",
                blame="architecture",
                workaround="Do not check PMBIDR_EL1.P again after the buffer was enabled; or hide_ownership with "
                "FEAT_FGT.",
                source="A. Elisei, 23 Nov 2022; M. Rutland, 4 Jan 2023 (kvm.md G11, P7g)",
            )
        ]
