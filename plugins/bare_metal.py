"""The baseline: the same program on the same processor without virtualization."""

from __future__ import annotations

from dataclasses import dataclass

from spepolicy.hookspecs import hookimpl


@dataclass
class BareMetal:
    """No virtualization: what a profile looks like when nothing can fault behind the guest's back.

    Mechanism: one stage of translation, no traps, no exits, PMBIRQ goes straight to Linux. Blackouts are left for a
    full buffer (interrupt latency plus the driver's restart) and for a full AUX ring.
    Source: the yardstick of the whole discussion, "profiling that bare metal would have had" (kvm.md, terms).
    Needs: no hypervisor.
    Costs: none.
    Fails: never at stage 2, which does not exist.
    """

    @hookimpl
    def virtualization(self) -> bool:
        return False
