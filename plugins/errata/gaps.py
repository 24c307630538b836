"""What a profile lacks: blackouts and lost records that bare metal does not have."""

from __future__ import annotations

from spepolicy.judge.errata import Erratum, Findings

from .rules import observed, rule


@rule
def eret_into_profiling(findings: Findings) -> Erratum | None:
    """SPE-KVM-7: kvm.md G1. Only a policy that acts when profiling becomes enabled misses the moment."""
    if "profiling_enabled" not in findings.facts["hooks"]:
        return None
    return observed(
        findings,
        "el0_only_fault",
        id="SPE-KVM-7",
        title="EL0-only profiling starts by an ERET that KVM does not see",
        trigger="{E0SPE,E1SPE} = {1,0} with an enabled buffer that is not mapped at stage 2; the ERET to EL0 enables "
        "profiling.",
        versions="all without FEAT_FGT; trapping every ERET was rejected as too costly",
        effect_on_guest="None that it could see, unless the policy answers the fault with an event.",
        effect_on_profile="The first record at EL0 is lost and a blackout follows until KVM has handled the fault.",
        severity="medium",
        blame="architecture",
        workaround="Pin when the buffer is enabled instead of when profiling is; or profile EL1 as well (E1SPE=1).",
        source="M. Rutland, relayed by A. Elisei, 25 Jul 2022 (kvm.md G1)",
    )


@rule
def stage2_blackout(findings: Findings) -> Erratum | None:
    """SPE-KVM-12: kvm.md H1 to H7, A6."""
    if not findings.virtualized:
        return None
    host = findings.count("stage2_fault_host")
    seen = findings.seen("stage2_fault")
    return observed(
        findings,
        "stage2_fault",
        id="SPE-KVM-12",
        title="Gaps in the profile that bare metal does not have",
        trigger=f"A page of the buffer is not mapped at stage 2 when the SPU writes: {host} of {seen.count} times "
        "because the host's memory management or the VMM took it, otherwise because the policy had not mapped it yet "
        "or the guest changed it.",
        versions="all",
        effect_on_guest="None that it could see if KVM repairs the mapping and resumes; else see the event told.",
        effect_on_profile="The sample is lost, and nothing is sampled from the fault until PMBIRQ has been taken and "
        "handled: one blackout window a fault.",
        severity="medium",
        blame="host" if 2 * host > seen.count else "kvm",
        workaround="Keep the buffer mapped for as long as it is enabled; turn off NUMA balancing, KSM and the "
        "balloon for the guest's memory.",
        source="A. Elisei, 27 Jul 2022 (kvm.md H1 to H7, A6)",
    )


@rule
def data_loss(findings: Findings) -> Erratum | None:
    """SPE-KVM-13: kvm.md A1; spe.md rule 38."""
    if not findings.virtualized or findings.count("stage2_fault") == 0:
        return None
    thrown = findings.count("discarded_records")
    return observed(
        findings,
        "data_loss",
        id="SPE-KVM-13",
        title="Stage 2 fault in the middle of a record",
        trigger="A record straddles two pages and the second is not mapped at stage 2, or the implementation sets DL "
        "at a boundary.",
        versions="all; records of one fixed size never straddle pages",
        effect_on_guest="PMBSR_EL1.DL=1: Linux flags TRUNCATED and PARTIAL and disables the event until perf has "
        "read the ring.",
        effect_on_profile=f"{thrown} "
        "records "
        "that had "
        "been "
        "written "
        "were "
        "thrown "
        "away, "
        "because "
        "the last "
        "whole one "
        "cannot be "
        "found when "
        "sizes vary."
        if thrown
        else "The cut record is lost; those before it are whole, because their size is fixed.",
        severity="high" if thrown else "medium",
        blame="architecture",
        workaround="Never fault while a session is running: pin and map the whole buffer before it starts.",
        source="A. Elisei, 19 Apr and 27 Jul 2022 (kvm.md A1); Arm ARM D17.8.3 (spe.md rule 38)",
    )


@rule
def late_interrupt(findings: Findings) -> Erratum | None:
    """SPE-KVM-14: kvm.md A6, I2 and I3."""
    if not findings.virtualized or findings.facts["irq_delivery"] != "next_exit":
        return None
    return observed(
        findings,
        "irqs",
        id="SPE-KVM-14",
        title="Buffer management interrupt told to the guest at the next exit only",
        trigger="KVM looks at PMBSR_EL1.S at exits and does not let the physical PMBIRQ force one.",
        versions="all",
        effect_on_guest="PMBIRQ comes late, by up to the time between two exits.",
        effect_on_profile="Each buffer full and each fault makes a gap as long as the guest goes without an exit.",
        severity="medium",
        blame="kvm",
        workaround="Let the physical PMBIRQ force an exit, as the series does from its sixth version on.",
        source="M. Zyngier, 24 Dec 2019; A. Elisei, 14 Nov 2025 (kvm.md A6, I2 to I4)",
    )
