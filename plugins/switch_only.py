"""The series of December 2019: give the registers to the guest, switch them, and hope."""

from __future__ import annotations

from dataclasses import dataclass

from spepolicy.batch import Vcpus
from spepolicy.hookspecs import Event, hookimpl


@dataclass
class SwitchOnly:
    """Save and restore SPE registers at world switches; do nothing about memory.

    Mechanism: (1) nothing traps: MDCR_EL2.E2PB=0b11, TPMS=0. (2) Registers are saved and restored at each world switch,
    after a drain. (3) PMBIRQ is forwarded to the guest with PMBSR_EL1 as the hardware left it, a stage 2 fault too.
    Source: A. Murray, RFC v2, 20 Dec 2019 (kvm.md P1, E1); M. Zyngier: "if it works, it is only thanks to some side
    effect".
    Needs: nothing but the world switch.
    Costs: the registers at each exit.
    Fails: at any stage 2 fault, which is always possible: the guest reads EC 0x25, which it cannot repair, and its
    driver switches SPE off.
    """

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        faults.inject(Event.STAGE2_ABORT)
