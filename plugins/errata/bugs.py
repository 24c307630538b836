"""Bugs of KVM itself, where one was injected, and what its faults look like from outside."""

from __future__ import annotations

from spepolicy.judge.errata import Erratum, Findings

from .rules import observed, rule


@rule
def fault_by_bug(findings: Findings) -> Erratum | None:
    """SPE-KVM-21: kvm.md 4.5, case 2."""
    told, faults = findings.count("bug_told"), findings.count("stage2_fault_bug")
    return observed(
        findings,
        "stage2_fault_bug",
        id="SPE-KVM-21",
        title="Stage 2 fault on a page that KVM believes to be pinned",
        trigger=f"A bug of KVM left a page out while its range was pinned; the policy called {told} of {faults} such "
        "faults a bug of KVM.",
        versions="all; injected (kvm.bug)",
        effect_on_guest="That of any stage 2 fault: see the event told.",
        effect_on_profile="A lost sample and a blackout each time the SPU comes to the page; where the policy repairs "
        "and goes on, the bug stays hidden and biases every profile.",
        severity="high",
        blame="kvm",
        workaround="Compare the page with the list of pinned pages and with the notifier's notes before the fault is "
        "repaired (claims=look), and warn.",
        source="A. Elisei, 9 Aug and 12 Sep 2022 (kvm.md 4.5)",
    )


@rule
def forgotten_pins(findings: Findings) -> Erratum | None:
    """SPE-KVM-22: kvm.md H11, H12."""
    return observed(
        findings,
        "leaked_by_bug",
        id="SPE-KVM-22",
        title="Pins that KVM has forgotten",
        trigger="A bug of KVM leaves a page pinned when its set is unpinned.",
        versions="all; injected (kvm.bug)",
        effect_on_guest="None, until RLIMIT_MEMLOCK is used up and sessions are refused (SPE-KVM-9).",
        effect_on_profile="None until then. The host's memory stays locked after the VM is gone.",
        severity="high",
        blame="kvm",
        workaround="Count pins against unpins, and warn when a VM goes with a difference.",
        source="M. Zyngier, 15 Feb 2022 (kvm.md H11)",
    )
