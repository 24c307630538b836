"""Memory that is pinned, locked or replaced behind the guest."""

from __future__ import annotations

from spepolicy.judge.errata import Erratum, Findings

from .rules import observed, rule


@rule
def silent_divergence(findings: Findings) -> Erratum | None:
    """SPE-KVM-8: kvm.md H8."""
    return observed(
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


@rule
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
    return observed(
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


@rule
def stale_pins(findings: Findings) -> Erratum | None:
    """SPE-KVM-10: the pin table measured on Linux 6.1, finding 4."""
    return observed(
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


@rule
def leaked_pins(findings: Findings) -> Erratum | None:
    """SPE-KVM-11: kvm.md H11."""
    return observed(
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


@rule
def refused_without_limit(findings: Findings) -> Erratum | None:
    """SPE-KVM-16: kvm.md G16, H10."""
    if findings.count("pin_refused"):
        return None  # SPE-KVM-9
    return observed(
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
