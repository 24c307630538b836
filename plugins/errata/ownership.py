"""Who owns the buffer, and what a guest may ask of it: no SPE, a capped buffer, copies by KVM."""

from __future__ import annotations

from spepolicy.judge.errata import Erratum, Findings

from .rules import observed, rule


@rule
def hidden_spe(findings: Findings) -> Erratum | None:
    """SPE-KVM-17: kvm.md P0."""
    return observed(
        findings,
        "hidden",
        id="SPE-KVM-17",
        title="No SPE in the guest",
        trigger="The guest reads ID_AA64DFR0_EL1 or probes PMBIDR_EL1.",
        versions="all",
        effect_on_guest="PMSVer reads 0, PMBIDR_EL1.P reads 1, and accesses to PMS* and PMB* are UNDEFINED: Linux's "
        "driver does not bind, and perf_event_open() fails.",
        effect_on_profile="There is none.",
        severity="low",
        blame="kvm",
        workaround="Profile on the host, or with the PMU.",
        source="A. Elisei, 9 Apr 2021 (kvm.md P0)",
    )


@rule
def capped_buffer(findings: Findings) -> Erratum | None:
    """SPE-KVM-18: kvm.md E8, G15."""
    return observed(
        findings,
        "injected_too_large",
        id="SPE-KVM-18",
        title="Buffer refused because of its size",
        trigger="The guest enables a buffer that is larger than KVM serves (PMBIDR_EL1.MaxBuffSize); KVM tells BSC 4.",
        versions="all; BSC 4 and MaxBuffSize are for hypervisors (DEN0154), and Linux 6.18 knows neither",
        effect_on_guest="A buffer management event before the first record. Linux has no case for it and switches SPE "
        "off without a word to perf.",
        effect_on_profile="The session has no records. Snapshot mode, which needs a large ring, cannot be used.",
        severity="high",
        blame="kvm",
        workaround="A smaller AUX ring (perf record -m,SIZE), or a larger limit in the VMM.",
        source="J. Clark and A. Elisei, Aug 2025 to Jan 2026 (kvm.md E8, P9e)",
    )


@rule
def lost_copies(findings: Findings) -> Erratum | None:
    """SPE-KVM-19: kvm.md P7."""
    if findings.count("copies") == 0:
        return None
    return observed(
        findings,
        "discarded_records",
        id="SPE-KVM-19",
        title="Records lost between KVM's buffer and the guest's",
        trigger="KVM copies its own buffer out after the guest has unmapped or moved its buffer, or the VMM has no "
        "page behind it.",
        versions="all",
        effect_on_guest="A buffer management event with DL=1 for records that the SPU wrote without any.",
        effect_on_profile="The records since the guest opened its buffer are lost, and flagged as such.",
        severity="medium",
        blame="guest",
        workaround="Keep the buffer mapped until PMBLIMITR_EL1.E=0 has been read back, as the architecture asks.",
        source="A. Elisei, 23 Nov 2022 (kvm.md P7)",
    )
