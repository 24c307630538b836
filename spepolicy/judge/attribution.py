"""How well a policy's claims about the causes of stage 2 faults agree with the truth.

The confusion matrix `claims[lane, claimed, true]` counts answered stage 2 faults; both axes are
`spepolicy.hookspecs.Cause`. A policy that claims nothing has claimed UNKNOWN, which is never right: the judge always
knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spepolicy.hookspecs import Cause
from spepolicy.judge.lanes import Floats, ratio

if TYPE_CHECKING:
    from spepolicy.drivers.simulate import Result

__all__ = ["accuracy", "claimed_share", "recall"]


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
