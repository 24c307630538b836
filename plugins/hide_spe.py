"""What mainline does: the guest has no SPE."""

from __future__ import annotations

from dataclasses import dataclass

from spepolicy.hookspecs import Ownership, hookimpl


@dataclass
class HideSpe:
    """Hide SPE from guests, as mainline has done since 2021.

    Mechanism: ID_AA64DFR0_EL1.PMSVer reads 0 in the guest; MDCR_EL2 has TPMS=1 and E2PB=0b00, so that every access to
    PMS* and PMB* traps and is answered as UNDEFINED; PMBIDR_EL1.P reads 1, and a driver that probes it gives up.
    Source: A. Elisei, "KVM: arm64: Hide SPE from guests", 9 Apr 2021; Linux 6.18 arch/arm64/kvm/debug.c (kvm.md P0).
    Needs: nothing.
    Costs: none.
    Fails: never; perf_event_open() in the guest fails, and all of the time that its user wanted to see is black.
    """

    @hookimpl
    def ownership(self) -> Ownership:
        return Ownership.NOBODY
