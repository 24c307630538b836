"""Errata of KVM's SPE virtualization, from what the judge observed.

Each rule looks at one kind of observation and says what it means to a guest and to a profile, who could avoid it, and
what can be done. The cases are those of the kernel list's discussion of 2018 to 2026; `kvm.md` and `spe.md` are the
project's notes on it, with the same numbering (A7, G1, H8 and so on). A policy under which nothing happens gets an
empty list.
"""

from __future__ import annotations

from collections.abc import Callable

from spepolicy.hookspecs import hookimpl
from spepolicy.judge.errata import Erratum, Findings

SPE_V1P3 = 4  # ID_AA64DFR0_EL1.PMSVer

Rule = Callable[[Findings], Erratum | None]
_RULES: list[Rule] = []


def _rule(rule: Rule) -> Rule:
    _RULES.append(rule)
    return rule


class KernelErrata:
    """Reports what the KVM/arm64 discussion calls errata, limitations and bugs."""

    @hookimpl
    def report_errata(self, findings: Findings) -> list[Erratum]:
        """Apply every rule to *findings*."""
        found = (rule(findings) for rule in _RULES)
        return [erratum for erratum in found if erratum is not None]


def _observed(findings: Findings, name: str, **text: str) -> Erratum | None:
    """An erratum with count and first trace of observation *name*, or None if it did not happen."""
    seen = findings.seen(name)
    if seen.count == 0:
        return None
    return Erratum(**text, count=seen.count, first_trace=seen.first)


@_rule
def external_abort_event(findings: Findings) -> Erratum | None:
    """SPE-KVM-1: kvm.md A7, E2."""
    if findings.spe_version < SPE_V1P3:
        return None  # IMPLEMENTATION DEFINED whether an external abort is reported to the SPU: the guest must expect it
    return _observed(
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


@_rule
def implementation_defined_event(findings: Findings) -> Erratum | None:
    """SPE-KVM-2: kvm.md E4."""
    return _observed(
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


@_rule
def stage2_abort_told(findings: Findings) -> Erratum | None:
    """SPE-KVM-3: kvm.md E1, A18."""
    return _observed(
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


@_rule
def mapped_buffer_called_unmapped(findings: Findings) -> Erratum | None:
    """SPE-KVM-4: kvm.md G6, against truth: the SPU itself saw no stage 1 fault."""
    told, real = findings.seen("injected_stage1"), findings.count("stage1_fault")
    if told.count == 0 or real >= told.count:
        return None
    return _observed(
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


@_rule
def silent_loss(findings: Findings) -> Erratum | None:
    """SPE-KVM-5: spe.md 3.4."""
    return _observed(
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


@_rule
def forged_data_loss(findings: Findings) -> Erratum | None:
    """SPE-KVM-6: kvm.md E4; spe.md rule 38."""
    return _observed(
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


@_rule
def eret_into_profiling(findings: Findings) -> Erratum | None:
    """SPE-KVM-7: kvm.md G1. Only a policy that acts when profiling becomes enabled misses the moment."""
    if "profiling_enabled" not in findings.facts["hooks"]:
        return None
    return _observed(
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


@_rule
def silent_divergence(findings: Findings) -> Erratum | None:
    """SPE-KVM-8: kvm.md H8."""
    return _observed(
        findings,
        "diverged_records",
        id="SPE-KVM-8",
        title="Records written to a page that the VMM no longer shows",
        trigger="The host replaces the page behind the VMM's address while KVM keeps the old one mapped, because the "
        "policy ignores the notifier or holds a stale pin.",
        versions="all",
        effect_on_guest="Guest and VMM disagree about memory: virtio, migration and a debugger see the new page, the "
        "SPU writes the old one.",
        effect_on_profile="No fault and no blackout, but records are invisible to whoever reads through the VMM, and "
        "gone after a migration.",
        severity="high",
        blame="kvm",
        workaround="Honour MMU_NOTIFY_CLEAR for operations that replace pages (MADV_DONTNEED, balloon, hole punch); "
        "ignore only what leaves the page in place.",
        source="Linux 6.18 mm/, rule of A. Elisei, 12 Aug 2022 (kvm.md H8)",
    )


@_rule
def memlock_limit(findings: Findings) -> Erratum | None:
    """SPE-KVM-9: kvm.md H12, G7."""
    if findings.count("pin_refused") == 0:
        return None
    limit_mib = findings.facts["memlock_pages"] / 256
    if findings.count("refused"):
        name, severity = "refused", "high"
        on_guest = "The session is refused by a buffer management event."
        on_profile = "The session has no records."
    else:
        name, severity = "pin_refused", "medium"
        on_guest = "None at once: pages that could not be pinned may fault at stage 2 later."
        on_profile = "Gaps wherever an unpinned page is unmapped."
    return _observed(
        findings,
        name,
        id="SPE-KVM-9",
        title="Buffer not pinned because of RLIMIT_MEMLOCK",
        trigger=f"The policy pins more than the VMM's limit of {limit_mib:g} MiB allows: a large buffer, several "
        "vCPUs, or the old buffer still pinned.",
        versions="all",
        effect_on_guest=on_guest,
        effect_on_profile=on_profile,
        severity=severity,
        blame="limit",
        workaround="Raise RLIMIT_MEMLOCK of the VMM to the sum of all vCPUs' buffers, twice that for policies that "
        "pin the next buffer before they drop the last; or give the VMM CAP_IPC_LOCK.",
        source="A. Elisei and W. Deacon, 19 Apr 2022 (kvm.md H12, G7)",
    )


@_rule
def stale_pins(findings: Findings) -> Erratum | None:
    """SPE-KVM-10: the pin table measured on Linux 6.1, finding 4."""
    return _observed(
        findings,
        "stale_pins",
        id="SPE-KVM-10",
        title="Pin held on a page that is no longer the guest's",
        trigger="The VMM or a balloon drops a pinned page (MADV_DONTNEED, hole punch, truncate, mmap MAP_FIXED): the "
        "pin keeps the old page alive, the address gets a new one.",
        versions="all",
        effect_on_guest="None by itself; memory stays accounted that nobody can use.",
        effect_on_profile="None if stage 2 follows the new page; with a notifier filter see SPE-KVM-8.",
        severity="low",
        blame="host",
        workaround="The VMM must not discard memory in which a buffer is enabled; KVM can drop the pin when the "
        "notifier comes.",
        source="Linux 6.1 on arm64, recorded with kprobes (pin table, finding 4); kvm.md H7",
    )


@_rule
def leaked_pins(findings: Findings) -> Erratum | None:
    """SPE-KVM-11: kvm.md H11."""
    return _observed(
        findings,
        "pins_leaked",
        id="SPE-KVM-11",
        title="Pages still pinned when the VM is gone",
        trigger="The VM goes while a buffer is pinned, and the policy does not unpin in vm_destroyed.",
        versions="all",
        effect_on_guest="None: it is gone.",
        effect_on_profile="None. The host loses memory: it can neither be reclaimed nor moved, and counts as locked.",
        severity="high",
        blame="kvm",
        workaround="Unpin in kvm_arch_flush_shadow_all(), which also runs when the VMM is killed.",
        source="M. Zyngier and A. Elisei, 14 and 15 Feb 2022 (kvm.md H11)",
    )


@_rule
def stage2_blackout(findings: Findings) -> Erratum | None:
    """SPE-KVM-12: kvm.md H1 to H7, A6."""
    if not findings.virtualized:
        return None
    host = findings.count("stage2_fault_host")
    seen = findings.seen("stage2_fault")
    return _observed(
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


@_rule
def data_loss(findings: Findings) -> Erratum | None:
    """SPE-KVM-13: kvm.md A1; spe.md rule 38."""
    if not findings.virtualized or findings.count("stage2_fault") == 0:
        return None
    thrown = findings.count("discarded_records")
    return _observed(
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


@_rule
def late_interrupt(findings: Findings) -> Erratum | None:
    """SPE-KVM-14: kvm.md A6, I2 and I3."""
    if not findings.virtualized or findings.facts["irq_delivery"] != "next_exit":
        return None
    return _observed(
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


@_rule
def resumed_cut_record(findings: Findings) -> Erratum | None:
    """SPE-KVM-15: spe.md rule 45 and section 4.7."""
    return _observed(
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


@_rule
def refused_without_limit(findings: Findings) -> Erratum | None:
    """SPE-KVM-16: kvm.md G16, H10."""
    if findings.count("pin_refused"):
        return None  # SPE-KVM-9
    return _observed(
        findings,
        "refused",
        id="SPE-KVM-16",
        title="Session refused although the guest's buffer is mapped",
        trigger="The policy cannot pin or map a page of the buffer when it is enabled, and the memlock limit is not "
        "the reason: the page has no memory behind it, or the policy takes part in no such session.",
        versions="all",
        effect_on_guest="A buffer management event before the first record. Linux switches SPE off.",
        effect_on_profile="The session has no records.",
        severity="high",
        blame="kvm",
        workaround="Leave such a page to a stage 2 fault; the session may never reach it.",
        source="A. Elisei, 19 Apr 2022 (kvm.md G16, H10)",
    )
