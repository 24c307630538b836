"""Errata of KVM's SPE virtualization, from what the judge observed.

Each rule looks at one kind of observation and says what it means to a guest and to a profile, who could avoid it, and
what can be done. The cases are those of the kernel list's discussion of 2018 to 2026; `kvm.md` and `spe.md` are the
project's notes on it, with the same numbering (A7, G1, H8 and so on). A policy under which nothing happens gets an
empty list. The rules are in modules by theme: what the guest is told, gaps, memory, ownership and bugs.
"""

from __future__ import annotations

from spepolicy.hookspecs import hookimpl
from spepolicy.judge.errata import Erratum, Findings

from . import bugs, gaps, memory, ownership, told
from .rules import RULES

__all__ = ["KernelErrata", "bugs", "gaps", "memory", "ownership", "told"]


class KernelErrata:
    """Reports what the KVM/arm64 discussion calls errata, limitations and bugs."""

    @hookimpl
    def report_errata(self, findings: Findings) -> list[Erratum]:
        """Apply every rule to *findings*."""
        found = (rule(findings) for rule in RULES)
        return [erratum for erratum in found if erratum is not None]
