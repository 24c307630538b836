"""What users of `window_pin` have to know."""

from __future__ import annotations

from collections.abc import Sequence

from spepolicy.hookspecs import hookimpl
from spepolicy.judge.errata import Erratum, Findings


class WindowErrata:
    """Reports the gap at the end of each window. Every reporter is asked about every policy: it speaks of its own."""

    @hookimpl
    def report_errata(self, findings: Findings) -> Sequence[Erratum]:
        """Return the erratum if windows ended."""
        blackouts = findings.seen("stage2_blackout")
        if findings.policy != "window_pin" or blackouts.count == 0:
            return []
        return [
            Erratum(
                id="WINDOW-PIN-1",
                title="Profiling pauses at the end of each pinned window",
                trigger="The SPU leaves the pages that KVM pinned ahead.",
                versions="all",
                effect_on_guest="None: the fault is repaired and never shown.",
                effect_on_profile="A gap of some microseconds a window, always at the same distance in the buffer.",
                severity="low",
                blame="kvm",
                count=blackouts.count,
                first_trace=blackouts.first,
                workaround="Raise policy.window_pages towards the size of the buffer.",
                source="plugins/template of spepolicy",
            )
        ]
