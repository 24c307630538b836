"""How well a policy's claims about the causes of stage 2 faults agree with the truth.

The confusion matrix `claims[lane, claimed, true]` counts answered stage 2 faults; both axes are
`spepolicy.hookspecs.Cause`. A policy that claims nothing has claimed UNKNOWN, which is never right: the judge always
knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spepolicy.hookspecs import Cause
from spepolicy.judge.lanes import Floats, ratio
from spepolicy.machine.scenario import Bug

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result

__all__ = ["BugVerdict", "accuracy", "bug_table", "claimed_share", "confusion", "judge_bug", "recall"]

# From where on an answer is yes: of ten faults that a bug caused nine are called one, and of ten others at most one.
_TOLD, _FALSE = 0.9, 0.1


def accuracy(result: Result) -> Floats:
    """Return float64[N]: stage 2 faults whose cause was claimed rightly / all; NaN where there was none."""
    claims = result.claims
    right = np.trace(claims, axis1=1, axis2=2) - claims[:, Cause.UNKNOWN, Cause.UNKNOWN]
    return ratio(right, claims.sum(axis=(1, 2)))


def claimed_share(result: Result) -> Floats:
    """Return float64[N]: stage 2 faults for which any cause but UNKNOWN was claimed / all; NaN where there was none."""
    total = result.claims.sum(axis=(1, 2))
    return ratio(total - result.claims[:, Cause.UNKNOWN, :].sum(axis=1), total)


def recall(result: Result, cause: Cause) -> Floats:
    """Return float64[N]: stage 2 faults truly of *cause* claimed as such / all of *cause*; NaN without any."""
    return ratio(result.claims[:, cause, cause], result.claims[:, :, cause].sum(axis=1))


def confusion(result: Result) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return int64[6, 6]: stage 2 faults of all lanes by claimed and true `Cause`."""
    total: np.ndarray[tuple[int, int], np.dtype[np.int64]] = result.claims.sum(axis=0)
    return total


@dataclass(frozen=True)
class BugVerdict:
    """Whether a policy can tell a bug of KVM from a legitimate fault, by what it claimed in one run."""

    bug: Bug
    faults: int  # stage 2 faults, all lanes
    by_bug: int  # of these, truly caused by the bug
    told: float | None  # share of those that were claimed as KVM_BUG; None without any
    false_alarms: float | None  # share of the others that were claimed as KVM_BUG; None without any
    struck: int  # pages that the bug left a trace on without a fault: leaked pins, or records that went astray

    @property
    def answer(self) -> str:
        """ "yes", "partly" or "no", or why the question does not arise."""
        if self.told is None:
            return "it makes no fault" if self.struck else "it did not strike"
        false = self.false_alarms or 0.0
        if self.told >= _TOLD and false <= _FALSE:
            return "yes"
        return "partly" if self.told > false + _FALSE else "no"


def judge_bug(result: Result) -> BugVerdict:
    """Answer "can a KVM bug be told from a legitimate fault?" for *result*, in which `kvm.bug` was injected."""
    matrix = confusion(result)
    by_bug, faults = int(matrix[:, Cause.KVM_BUG].sum()), int(matrix.sum())
    right, claimed = int(matrix[Cause.KVM_BUG, Cause.KVM_BUG]), int(matrix[Cause.KVM_BUG].sum())
    return BugVerdict(
        bug=Bug(result.scenario.kvm.bug),
        faults=faults,
        by_bug=by_bug,
        told=right / by_bug if by_bug else None,
        false_alarms=(claimed - right) / (faults - by_bug) if faults > by_bug else None,
        struck=int(result.vm["leaked_pins"].sum() + result.truth["diverged_records"].sum()),
    )


def bug_table(verdicts: Mapping[str, BugVerdict]) -> list[str]:
    """Return the lines of a table that answers the question for each policy."""
    lines = [f"{'can a KVM bug be told?':<26} {'answer':<18} {'faults':>8} {'by bug':>8} {'told':>7} {'false':>7}"]
    for name, verdict in verdicts.items():
        shares = ("-" if share is None else f"{100 * share:.0f} %" for share in (verdict.told, verdict.false_alarms))
        told, false = shares
        lines.append(f"{name:<26} {verdict.answer:<18} {verdict.faults:>8} {verdict.by_bug:>8} {told:>7} {false:>7}")
    return lines
