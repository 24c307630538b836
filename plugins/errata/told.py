"""What the guest is told: the buffer management events that a policy chooses, and what Linux makes of them."""

from __future__ import annotations

from spepolicy.arch.versions import VERSIONS, AbortReport
from spepolicy.judge.errata import Erratum, Findings

from .rules import observed, rule


@rule
def external_abort_event(findings: Findings) -> Erratum | None:
    """SPE-KVM-1: kvm.md A7, E2."""
    if AbortReport.TO_SPU in VERSIONS[findings.spe_version].aborts:
        return None  # IMPLEMENTATION DEFINED whether an external abort is reported to the SPU: the guest must expect it
    return observed(
        findings,
        "injected_external",
        id="SPE-KVM-1",
        title="External abort reported as a buffer management event",
        trigger="The policy answers a stage 2 fault of the SPU by telling the guest EC 0x24, FSC 0x10, EA=1.",
        versions="SPEv1p3 (ID_AA64DFR0_EL1.PMSVer = 4) and later; before, an implementation may report it so",
        effect_on_guest="PMBSR_EL1 shows a syndrome that hardware of this version never gives. Linux does not look "
        "at EA and treats the event as an unexpected fault: SPE is switched off.",
        effect_on_profile="A gap until the event is restarted: Linux tells perf nothing unless DL=1.",
        severity="medium",
        blame="kvm",
        workaround="Tell the guest an IMPLEMENTATION DEFINED event (EC 0x1f) with DL=1, or deliver an SError as the "
        "version asks for.",
        source="Arm ARM D17.8.4 (spe.md rule 42); O. Upton, 9 Aug and 13 Sep 2022 (kvm.md A7)",
    )


@rule
def implementation_defined_event(findings: Findings) -> Erratum | None:
    """SPE-KVM-2: kvm.md E4."""
    return observed(
        findings,
        "injected_impdef",
        id="SPE-KVM-2",
        title="IMPLEMENTATION DEFINED buffer management event that the guest's processor does not define",
        trigger="The policy answers a stage 2 fault of the SPU by telling the guest EC 0x1f.",
        versions="all",
        effect_on_guest="Allowed by the architecture, but MIDR_EL1 names a processor whose manual does not describe "
        "it. Linux and FreeBSD switch SPE off; a vendor's kernel may misread it.",
        effect_on_profile="A gap until perf enables the event again, which it does if it is told (DL=1: TRUNCATED, "
        "PARTIAL); otherwise until the event is restarted.",
        severity="low",
        blame="kvm",
        workaround="None in the guest. Keep stage 2 mapped for as long as the buffer is enabled, so that it is not "
        "needed.",
        source="O. Upton and A. Elisei, 13 Sep 2022 (kvm.md E4)",
    )


@rule
def stage2_abort_told(findings: Findings) -> Erratum | None:
    """SPE-KVM-3: kvm.md E1, A18."""
    return observed(
        findings,
        "injected_stage2",
        id="SPE-KVM-3",
        title="Stage 2 abort told to a guest that has no stage 2",
        trigger="The policy hands EC 0x25 to the guest as the hardware reported it.",
        versions="all, for a guest without nested virtualization",
        effect_on_guest="A fault of a translation stage that does not exist for it. With nested virtualization its "
        "hypervisor would look for a fault in the wrong tables. Linux switches SPE off.",
        effect_on_profile="A gap until the event is restarted; without DL nobody is told.",
        severity="medium",
        blame="kvm",
        workaround="Tell an IMPLEMENTATION DEFINED event with DL=1, or repair the mapping and resume if DL=0.",
        source="O. Upton, 13 Sep 2022 (kvm.md E1, A18)",
    )


@rule
def mapped_buffer_called_unmapped(findings: Findings) -> Erratum | None:
    """SPE-KVM-4: kvm.md G6, against truth: the SPU itself saw no stage 1 fault."""
    told, real = findings.seen("injected_stage1"), findings.count("stage1_fault")
    if told.count == 0 or real >= told.count:
        return None
    return observed(
        findings,
        "injected_stage1",
        id="SPE-KVM-4",
        title="Stage 1 abort told to the guest that the SPU did not take",
        trigger="The policy tells EC 0x24 with a translation fault, because its walk failed or because it could not "
        "pin.",
        versions="all",
        effect_on_guest="Blamed for its own tables, at a time when the SPU had not yet written. Linux switches SPE "
        "off.",
        effect_on_profile="The session has no records.",
        severity="medium",
        blame="kvm",
        workaround="The guest must have mapped its buffer before PMBLIMITR_EL1.E=1. For a failed pin, raise "
        "RLIMIT_MEMLOCK.",
        source="A. Elisei, 12 Dec 2025 (kvm.md G6)",
    )


@rule
def silent_loss(findings: Findings) -> Erratum | None:
    """SPE-KVM-5: spe.md 3.4."""
    return observed(
        findings,
        "silent_fatal",
        id="SPE-KVM-5",
        title="Profiling ends and perf is not told",
        trigger="A buffer management event other than buffer full reaches the Linux driver with DL=0.",
        versions="all; a property of Linux's driver (6.18) that the policy's choice of event exposes",
        effect_on_guest="The driver switches SPE off and logs at most a rate-limited line. No AUX flag is set, so "
        "the event stays enabled in perf's view until the task is switched out or the event restarted.",
        effect_on_profile="Samples are missing without a mark: the user cannot know, and shares of functions are "
        "biased.",
        severity="high",
        blame="kvm" if findings.virtualized else "guest",
        workaround="Set DL=1 in every event that is not the guest's own doing: Linux then flags TRUNCATED and "
        "PARTIAL, and perf enables the event again.",
        source="Linux 6.18 drivers/perf/arm_spe_pmu.c, arm_spe_pmu_buf_get_fault_act() (spe.md 3.4)",
    )


@rule
def forged_data_loss(findings: Findings) -> Erratum | None:
    """SPE-KVM-6: kvm.md E4; spe.md rule 38."""
    return observed(
        findings,
        "forged_loss",
        id="SPE-KVM-6",
        title="Data loss told to the guest although no record was cut",
        trigger="The policy sets PMBSR_EL1.DL in an event that the hardware reported with DL=0.",
        versions="all; at a record's boundary IMPLEMENTATION DEFINED values of DL exist (RYZJQX)",
        effect_on_guest="Linux flags TRUNCATED and PARTIAL and disables the event until perf has read the ring.",
        effect_on_profile="Whole records may be thrown away as suspect; on the other hand perf knows of the gap.",
        severity="low",
        blame="kvm",
        workaround="Accept it: an honest DL=0 would end the session silently (SPE-KVM-5). Better, resume after "
        "repairing stage 2.",
        source="A. Elisei and O. Upton, 13 Sep 2022 (kvm.md E4); Arm ARM D17.8.3 (spe.md rule 38)",
    )


@rule
def resumed_cut_record(findings: Findings) -> Erratum | None:
    """SPE-KVM-15: spe.md rule 45 and section 4.7."""
    return observed(
        findings,
        "resumed_cut",
        id="SPE-KVM-15",
        title="Profiling resumed behind a record that was cut",
        trigger="The policy resumes after a stage 2 fault with DL=1, and does not tell the guest.",
        versions="all; records of one fixed size never straddle pages",
        effect_on_guest="None: PMBSR_EL1 shows nothing.",
        effect_on_profile="The half record stays in the stream. A decoder merges it with the next one: perf reports "
        "a sample that never was, for example a store with the address of a load.",
        severity="high",
        blame="kvm",
        workaround="With DL=1 tell the guest, so that it drops what it cannot parse; resume only with DL=0.",
        source="Arm ARM D17.8 RHLXGD (spe.md rule 45); observed with perf 6.1 (spe.md 4.7)",
    )


@rule
def unreported_external_abort(findings: Findings) -> Erratum | None:
    """SPE-HW-1: an external abort that the SPU is not told of; spe.md rule 42."""
    if findings.facts.get("external_abort") not in ("ignored", "serror"):
        return None
    serror = findings.count("serror") > 0
    return observed(
        findings,
        "external_abort",
        id="SPE-HW-1",
        title="Records that memory refused, in a stream that does not show it",
        trigger="A buffer write meets an external abort, and the implementation "
        + ("delivers an SError." if serror else "ignores it."),
        versions="all; from SPEv1p3 on nothing else is permitted, but a fault for an abort of a walk",
        effect_on_guest="PMBSR_EL1 shows nothing. "
        + ("The SError goes to KVM, which cannot tell that SPE was the reason." if serror else "Nobody is told."),
        effect_on_profile="Old bytes stand where the records should be; a decoder takes them for records of an earlier "
        "session, or for damage.",
        severity="high",
        blame="architecture",
        workaround="Clear the AUX pages before they are used again, so that old records are not taken for new ones.",
        source="Arm ARM D17.8.4 (spe.md rule 42)",
    )
